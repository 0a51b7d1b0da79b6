//! Links the program to a fixed address.

fn main() {
    // Some 25,000 pointers would be rewritten at each start of a static program that can lie anywhere, in a hundred
    // pages that are then no longer shared. Of gcc's options for this the last counts.
    for argument in ["-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
