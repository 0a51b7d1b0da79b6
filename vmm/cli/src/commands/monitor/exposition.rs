//! What was seen of the pods, in Prometheus' text format.

use std::borrow::Cow;
use std::fmt::Error;

use hull_pod::metrics::{
    CALL_BOUNDS, CallMetrics, Identity, InterfaceMetrics, MachineMetrics, Manager, PodMetrics,
    ProcessMetrics,
};
use hull_pod::text::cut;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::node::{BOOT_BOUNDS, Seen, SeenPod};
use crate::failure::Failure;

/// Names are somebody else's, and of any length.
const LABEL_MAX: usize = 253;

type Labels<'a> = Vec<(&'static str, Cow<'a, str>)>;

/// # Errors
/// When there is no memory for it.
pub fn exposition(seen: Seen) -> Result<String, Failure> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Exposition(seen)));
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|e| Failure::Format(e.to_string()))?;
    Ok(text)
}

#[derive(Debug)]
struct Exposition(Seen);

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), Error> {
        let mut out = Out {
            encoder,
            pods: &self.0.pods,
        };
        out.node(&self.0)?;
        out.pods()?;
        out.machines()?;
        out.interfaces()?;
        out.calls()
    }
}

struct Out<'e, 'p> {
    encoder: DescriptorEncoder<'e>,
    pods: &'p [SeenPod],
}

impl Out<'_, '_> {
    fn node(&mut self, seen: &Seen) -> Result<(), Error> {
        let mut gauge = |name, help, value: f64| {
            self.encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&value)
        };
        gauge(
            "hull_monitor_scrape_seconds",
            "How long asking the pods took",
            seen.took.as_secs_f64(),
        )?;
        gauge(
            "hull_monitor_pods_left_out",
            "Pods that were not asked, as there are too many",
            number(seen.left_out as u64),
        )?;
        let boots = &seen.boots;
        let buckets: Vec<_> = BOOT_BOUNDS.into_iter().zip(boots.buckets).collect();
        self.encoder
            .encode_descriptor(
                "hull_boot_seconds",
                "From a machine's start to its agent's first answer, of the pods seen so far",
                None,
                MetricType::Histogram,
            )?
            .encode_histogram::<NoLabelSet>(boots.seconds, boots.count, &buckets, None)
    }

    fn pods(&mut self) -> Result<(), Error> {
        self.each(
            "hull_pod_up",
            "Whether the pod's supervisor answered",
            |pod| Some(f64::from(u8::from(pod.metrics.is_some()))),
        )?;
        let supervisor = |look: fn(&ProcessMetrics) -> f64| {
            move |pod: &SeenPod| {
                pod.metrics
                    .as_ref()
                    .map(|metrics| look(&metrics.supervisor))
            }
        };
        self.each(
            "hull_pod_supervisor_resident_bytes",
            "Memory of the pod's supervisor, or shim",
            supervisor(|process| number(process.resident_bytes)),
        )?;
        self.each(
            "hull_pod_supervisor_proportional_bytes",
            "The same, with what is shared divided among those who share it",
            supervisor(|process| number(process.proportional_bytes)),
        )?;
        self.counted(
            "hull_pod_supervisor_cpu_seconds",
            "Processor time of the pod's supervisor, or shim",
            supervisor(|process| process.cpu_seconds),
        )?;
        self.counted(
            "hull_pod_restarts",
            "Restarts of all containers of the pod; under containerd a restart is a new container",
            |pod| {
                let metrics = pod.metrics.as_ref();
                metrics
                    .filter(|metrics| metrics.identity.manager == Manager::Hull)
                    .map(|metrics| number(metrics.restarts))
            },
        )
    }

    fn machines(&mut self) -> Result<(), Error> {
        let vmm = |look: fn(&ProcessMetrics) -> f64| {
            move |pod: &SeenPod| machine(pod)?.vmm.as_ref().map(look)
        };
        self.each(
            "hull_pod_boot_seconds",
            "From the machine's start to its agent's first answer",
            |pod| Some(machine(pod)?.boot_seconds),
        )?;
        self.each("hull_pod_vcpus", "Processors of the machine", |pod| {
            Some(f64::from(machine(pod)?.vcpus))
        })?;
        self.each("hull_pod_guest_memory_bytes", "RAM of the guest", |pod| {
            Some(number(machine(pod)?.memory_bytes))
        })?;
        self.each(
            "hull_pod_guest_memory_touched_bytes",
            "So much of the guest's RAM the host has provided",
            |pod| Some(number(machine(pod)?.touched_bytes)),
        )?;
        self.each(
            "hull_pod_vmm_resident_bytes",
            "Memory of hull-vmm, with what of the guest's RAM is there",
            vmm(|process| number(process.resident_bytes)),
        )?;
        self.each(
            "hull_pod_vmm_proportional_bytes",
            "The same, with what is shared divided among those who share it",
            vmm(|process| number(process.proportional_bytes)),
        )?;
        self.counted(
            "hull_pod_vmm_cpu_seconds",
            "Processor time of hull-vmm, the guest's included",
            vmm(|process| process.cpu_seconds),
        )
    }

    fn interfaces(&mut self) -> Result<(), Error> {
        self.of_interfaces(
            "hull_pod_network_receive_bytes",
            "Bytes that the guest has received",
            |interface| interface.received_bytes,
        )?;
        self.of_interfaces(
            "hull_pod_network_receive_packets",
            "Packets that the guest has received",
            |interface| interface.received_packets,
        )?;
        self.of_interfaces(
            "hull_pod_network_transmit_bytes",
            "Bytes that the guest has sent",
            |interface| interface.sent_bytes,
        )?;
        self.of_interfaces(
            "hull_pod_network_transmit_packets",
            "Packets that the guest has sent",
            |interface| interface.sent_packets,
        )
    }

    fn of_interfaces(
        &mut self,
        name: &str,
        help: &str,
        look: impl Fn(&InterfaceMetrics) -> u64,
    ) -> Result<(), Error> {
        let mut metric = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (pod, machine) in with_machines(self.pods) {
            for interface in &machine.interfaces {
                let mut labels = labels(&pod.identity);
                labels.push(("interface", short(&interface.tap)));
                metric
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, u64, u64>(&look(interface), None)?;
            }
        }
        Ok(())
    }

    fn calls(&mut self) -> Result<(), Error> {
        let mut metric = self.encoder.encode_descriptor(
            "hull_pod_agent_call_seconds",
            "How long calls of the guest's agent took",
            None,
            MetricType::Histogram,
        )?;
        for (pod, machine) in with_machines(self.pods) {
            for call in &machine.calls {
                let counts = call.buckets.iter().copied();
                let buckets: Vec<_> = CALL_BOUNDS.into_iter().zip(counts).collect();
                metric
                    .encode_family(&with_call(pod, call))?
                    .encode_histogram::<NoLabelSet>(call.seconds, call.count, &buckets, None)?;
            }
        }
        let mut metric = self.encoder.encode_descriptor(
            "hull_pod_agent_calls_failed",
            "Calls of the guest's agent that it refused, or did not answer",
            None,
            MetricType::Counter,
        )?;
        for (pod, machine) in with_machines(self.pods) {
            for call in &machine.calls {
                metric
                    .encode_family(&with_call(pod, call))?
                    .encode_counter::<NoLabelSet, u64, u64>(&call.failed, None)?;
            }
        }
        Ok(())
    }

    /// A gauge of every pod that has it.
    fn each(
        &mut self,
        name: &str,
        help: &str,
        look: impl Fn(&SeenPod) -> Option<f64>,
    ) -> Result<(), Error> {
        let mut metric = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for pod in self.pods {
            if let Some(value) = look(pod) {
                let labels = labels(&pod.identity);
                metric.encode_family(&labels)?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    /// A counter of every pod that has it.
    fn counted(
        &mut self,
        name: &str,
        help: &str,
        look: impl Fn(&SeenPod) -> Option<f64>,
    ) -> Result<(), Error> {
        let mut metric = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for pod in self.pods {
            if let Some(value) = look(pod) {
                metric
                    .encode_family(&labels(&pod.identity))?
                    .encode_counter::<NoLabelSet, f64, u64>(&value, None)?;
            }
        }
        Ok(())
    }
}

fn machine(pod: &SeenPod) -> Option<&MachineMetrics> {
    pod.metrics
        .as_ref()
        .and_then(|metrics: &PodMetrics| metrics.machine.as_ref())
}

fn with_machines(pods: &[SeenPod]) -> impl Iterator<Item = (&SeenPod, &MachineMetrics)> {
    pods.iter().filter_map(|pod| Some((pod, machine(pod)?)))
}

fn labels(identity: &Identity) -> Labels<'_> {
    let manager = match identity.manager {
        Manager::Hull => "hull",
        Manager::Containerd => "containerd",
    };
    vec![
        ("manager", manager.into()),
        ("namespace", short(&identity.namespace)),
        ("pod", short(&identity.name)),
        ("id", short(&identity.id)),
    ]
}

fn with_call<'a>(pod: &'a SeenPod, call: &'a CallMetrics) -> Labels<'a> {
    let mut labels = labels(&pod.identity);
    labels.push(("call", short(&call.call)));
    labels
}

fn short(text: &str) -> Cow<'_, str> {
    cut(text, LABEL_MAX).into()
}

/// Exact below 2^53, as all numbers of Prometheus are.
#[expect(clippy::cast_precision_loss, reason = "that is how Prometheus counts")]
fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::monitor::node::Boots;
    use std::time::Duration;

    fn pod(name: &str, metrics: bool) -> SeenPod {
        let identity = Identity {
            manager: Manager::Containerd,
            namespace: "shop".into(),
            name: name.into(),
            id: "abc".into(),
        };
        let process = ProcessMetrics {
            cpu_seconds: 1.5,
            resident_bytes: 4096,
            proportional_bytes: 2048,
        };
        let machine = MachineMetrics {
            boot_seconds: 0.25,
            vcpus: 2,
            vmm: Some(process),
            memory_bytes: 1 << 30,
            touched_bytes: 1 << 20,
            calls: vec![CallMetrics {
                call: "Exec".into(),
                count: 3,
                failed: 1,
                seconds: 60.5,
                buckets: vec![1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            }],
            interfaces: vec![InterfaceMetrics {
                tap: "hull0".into(),
                received_bytes: 10,
                received_packets: 1,
                sent_bytes: 20,
                sent_packets: 2,
            }],
        };
        SeenPod {
            identity: identity.clone(),
            metrics: metrics.then_some(PodMetrics {
                identity,
                supervisor: process,
                restarts: 0,
                machine: Some(machine),
            }),
        }
    }

    fn text(pods: Vec<SeenPod>) -> String {
        exposition(Seen {
            pods,
            left_out: 0,
            boots: Boots::default(),
            took: Duration::from_millis(5),
        })
        .unwrap()
    }

    #[test]
    fn a_pod_is_shown_with_all_that_it_says() {
        let text = text(vec![pod("web", true)]);

        let labels = r#"manager="containerd",namespace="shop",pod="web",id="abc""#;
        for line in [
            format!("hull_pod_up{{{labels}}} 1.0"),
            format!("hull_pod_vmm_resident_bytes{{{labels}}} 4096.0"),
            format!("hull_pod_vmm_cpu_seconds_total{{{labels}}} 1.5"),
            format!("hull_pod_guest_memory_touched_bytes{{{labels}}} 1048576.0"),
            format!(r#"hull_pod_network_transmit_bytes_total{{{labels},interface="hull0"}} 20"#),
            format!(r#"hull_pod_agent_call_seconds_bucket{{{labels},call="Exec",le="0.005"}} 2"#),
            format!(r#"hull_pod_agent_call_seconds_bucket{{{labels},call="Exec",le="+Inf"}} 3"#),
            format!(r#"hull_pod_agent_calls_failed_total{{{labels},call="Exec"}} 1"#),
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
    }

    #[test]
    fn one_that_does_not_answer_is_down() {
        let text = text(vec![pod("web", false)]);

        assert!(
            text.contains("hull_pod_up{") && text.contains("} 0.0\n"),
            "{text}"
        );
        assert!(!text.contains("resident_bytes{"));
    }

    #[test]
    fn no_name_breaks_out_of_its_quotes() {
        let name = format!("a\"}} 1\nhull_pod_up{{x=\"\\{}", "x".repeat(1000));

        let text = text(vec![pod(&name, false)]);

        let lines: Vec<&str> = text
            .lines()
            .filter(|l| l.contains("hull_pod_up{"))
            .collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert!(lines[0].len() < 500 && lines[0].ends_with("} 0.0"));
    }
}
