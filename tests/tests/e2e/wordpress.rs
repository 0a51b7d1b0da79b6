//! A blog of real programs: three replicas of WordPress, and the database that they find by its name.

use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::Hull;
use hull_tests::network::{Answer, get, host_network, post};
use hull_tests::pod::Pod;

/// The user `mysql` of the image `database`.
const MYSQL: u32 = 999;
const PORTS: [u16; 3] = [18081, 18082, 18083];

fn database(data: &Path) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: database}}
spec:
  restartPolicy: Never
  volumes: [{{name: data, hostPath: {{path: {}, type: Directory}}}}]
  containers:
  - name: mariadb
    image: database
    env:
    - {{name: MARIADB_DATABASE, value: blog}}
    - {{name: MARIADB_USER, value: blog}}
    - {{name: MARIADB_PASSWORD, value: secret}}
    ports: [{{containerPort: 3306}}]
    resources: {{limits: {{memory: 256Mi}}}}
    volumeMounts: [{{name: data, mountPath: /var/lib/mysql}}]
",
        data.display()
    )
}

fn web(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: nginx
    image: web
    command: [nginx]
    ports: [{{containerPort: 80, hostPort: {port}}}]
    resources: {{limits: {{memory: 64Mi}}}}
  - name: php
    image: web
    command: [php-fpm8.2]
    env:
    - {{name: WORDPRESS_DB_HOST, value: database}}
    - {{name: WORDPRESS_DB_NAME, value: blog}}
    - {{name: WORDPRESS_DB_USER, value: blog}}
    - {{name: WORDPRESS_DB_PASSWORD, value: secret}}
    resources: {{limits: {{memory: 192Mi}}}}
"
    )
}

fn server(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Asks until the blog answers so. Each time costs a run of WordPress.
fn page(port: u16, path: &str, what: &str, is_it: impl Fn(&Answer) -> bool) {
    let mut last = None;
    eventually(
        &format!("port {port} answers {path} with {what}"),
        Duration::from_secs(12),
        || {
            let answer = get(server(port), path);
            if answer.as_ref().is_ok_and(&is_it) {
                return Some(());
            }
            let status = answer.map(|answer| answer.status);
            let now = Some(format!("{status:?}"));
            if now != last {
                eprintln!("port {port}: {status:?}");
                last = now;
            }
            std::thread::sleep(Duration::from_secs(1));
            None
        },
    );
}

/// Waits for the database.
fn serving(database: &Pod) {
    let query = "mariadb --host=127.0.0.1 --user=blog --password=secret --execute='SELECT 1' blog";
    eventually("the database serves", Duration::from_secs(30), || {
        database
            .exec("mariadb", query)
            .status
            .success()
            .then_some(())
    });
}

fn write_post(port: u16, title: &str) {
    let string = |text: &str| format!("<string>{text}</string>");
    let member = |name: &str, text: &str| {
        format!(
            "<member><name>{name}</name><value>{}</value></member>",
            string(text)
        )
    };
    let post_struct = format!(
        "<struct>{}{}</struct>",
        member("post_title", title),
        member("post_status", "publish")
    );
    let params: String = [
        "<int>1</int>".to_owned(),
        string("admin"),
        string("correct-horse-9"),
        post_struct,
    ]
    .iter()
    .map(|value| format!("<param><value>{value}</value></param>"))
    .collect();
    let call = format!(
        "<?xml version=\"1.0\"?><methodCall><methodName>wp.newPost</methodName><params>{params}</params></methodCall>"
    );

    let answer = post(server(port), "/xmlrpc.php", "text/xml", &call).unwrap();

    assert!(
        answer.status == 200 && !answer.body.contains("<fault>"),
        "{answer:?}"
    );
}

#[test]
fn a_blog_has_three_replicas_and_a_database_that_survives_its_pod() {
    let _host = host_network();
    let hull = Hull::with_images(&["web", "database"]);
    let data = hull.work_dir().join("blog");
    std::fs::create_dir(&data).unwrap();
    chown(&data, Some(MYSQL), Some(MYSQL)).unwrap();
    let first_database = Pod::start(&hull, "database", &database(&data));
    let _webs: Vec<Pod> = PORTS
        .iter()
        .zip(["web-1", "web-2", "web-3"])
        .map(|(port, name)| Pod::start(&hull, name, &web(name, *port)))
        .collect();

    serving(&first_database);

    // Installed over HTTP, through a published port.
    page(PORTS[0], "/", "the way to its installation", |answer| {
        answer.status == 302 && answer.head.contains("/wp-admin/install.php")
    });
    let form = "weblog_title=Boats&user_name=admin&admin_password=correct-horse-9&admin_password2=correct-horse-9&pw_weak=on&admin_email=a%40example.org&blog_public=0";
    let installed = post(
        server(PORTS[0]),
        "/wp-admin/install.php?step=2",
        "application/x-www-form-urlencoded",
        form,
    )
    .unwrap();
    assert!(installed.body.contains("Success!"), "{installed:?}");

    // What one replica writes, all show.
    let titles = PORTS.map(|port| format!("Written at port {port}"));
    for (port, title) in PORTS.iter().zip(&titles) {
        write_post(*port, title);
    }
    let complete = |answer: &Answer| {
        answer.status == 200
            && answer.body.contains("<title>Boats</title>")
            && titles.iter().all(|title| answer.body.contains(title))
    };
    for port in PORTS {
        page(port, "/", "every post", complete);
    }

    // The database goes, with its address, and comes again.
    drop(first_database);
    let without = get(server(PORTS[0]), "/").unwrap();
    assert_eq!(without.status, 500, "{without:?}");
    let second_database = Pod::start(&hull, "database", &database(&data));
    serving(&second_database);
    for port in PORTS {
        page(port, "/", "every post again", complete);
    }
}
