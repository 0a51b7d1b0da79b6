//! Taps beside the interfaces of a namespace, and the redirection between them.

use std::io;

use hull_machine::config::{MAX_QUEUE_PAIRS, TapDescriptors};
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};

use super::netlink::Netlink;
use super::observe::name_of;
use super::{Doing, Namespace, ObservedInterface, Result, VhostNet, WiringError, filters, tap};

/// Descriptors of taps and vhost-net that a machine is started with at most: they go in one message, with others.
const MOST_DESCRIPTORS: usize = 96;

/// The taps of a machine.
#[derive(Debug)]
pub struct Plug {
    queue_pairs: u8,
    vhost: VhostNet,
    /// Those that traffic control was set up on.
    interfaces: Vec<Plugged>,
}

/// An interface that has its tap.
#[derive(Debug)]
struct Plugged {
    name: String,
    index: u32,
    /// The tap's index.
    tap: u32,
}

impl Plug {
    /// For so many interfaces at most. A tap has a queue for each of the machine's processors, up to what an interface
    /// of a machine can have.
    #[must_use]
    pub fn new(interfaces: usize, vcpus: u8, vhost: VhostNet) -> Self {
        Self {
            queue_pairs: queue_pairs(vcpus, interfaces),
            vhost,
            interfaces: Vec::new(),
        }
    }

    /// Pairs of queues that each interface has.
    #[must_use]
    pub fn queue_pairs(&self) -> u8 {
        self.queue_pairs
    }

    /// Makes a tap for an interface, to be handed to the machine, and has the kernel pass frames between the two. A tap
    /// is there until its descriptors are closed.
    ///
    /// What is left of a pod whose supervisor died is replaced. After an error nothing is left of it.
    ///
    /// # Errors
    /// [`WiringError`], with the interface and what was being done.
    pub fn add(
        &mut self,
        namespace: &Namespace,
        interface: &ObservedInterface,
    ) -> Result<TapDescriptors> {
        namespace.run(|| {
            let mut netlink = Netlink::open().doing("opening netlink")?;
            let added = self.wire(&mut netlink, interface);
            if added.is_err() {
                // The tap went with its descriptors; what is not here is another program's.
                let ours = |plugged: &Plugged| plugged.index == interface.index;
                if let Some(place) = self.interfaces.iter().position(ours) {
                    self.interfaces.remove(place);
                    // The first error is the one to tell.
                    let _ = filters::clear(&mut netlink, interface.index);
                }
            }
            added
        })
    }

    /// Lets the guest send from an interface's addresses as they are now.
    ///
    /// # Errors
    /// [`WiringError::Interface`].
    pub fn guard_anew(&self, namespace: &Namespace, interface: &ObservedInterface) -> Result<()> {
        let Some(plugged) = self
            .interfaces
            .iter()
            .find(|plugged| plugged.index == interface.index)
        else {
            return Ok(());
        };
        namespace.run(|| {
            let mut netlink = Netlink::open().doing("opening netlink")?;
            let name = &interface.name;
            // Nothing of the guest's gets in while nothing is checked.
            netlink
                .set_up(plugged.tap, false)
                .doing_to(name, "closing its tap")?;
            guard(&mut netlink, plugged.tap, interface)?;
            netlink
                .set_up(plugged.tap, true)
                .doing_to(name, "opening its tap")
        })
    }

    /// Gives the interfaces back to the namespace.
    ///
    /// # Errors
    /// The first of [`WiringError::Interface`]; all interfaces are tried.
    pub fn teardown(mut self, namespace: &Namespace) -> Result<()> {
        namespace.run(|| {
            let mut netlink = Netlink::open().doing("opening netlink")?;
            let mut outcome = Ok(());
            for plugged in self.interfaces.drain(..) {
                let cleared = filters::clear(&mut netlink, plugged.index)
                    .doing_to(&plugged.name, "taking filters off");
                outcome = outcome.and(cleared);
            }
            outcome
        })
    }

    fn wire(
        &mut self,
        netlink: &mut Netlink,
        interface: &ObservedInterface,
    ) -> Result<TapDescriptors> {
        let name = &interface.name;
        let (tap_name, queues) = tap::open(name, self.queue_pairs)?;
        let vhost = self.vhost.open(self.queue_pairs)?;
        let tap = shape_tap(netlink, &tap_name, interface)?;

        // The tap's side first: nothing of the guest's gets anywhere before it is checked.
        guard(netlink, tap, interface)?;

        let step = "redirecting what it receives";
        let prepared = filters::prepare(netlink, interface.index);
        traffic_control(prepared, name, step)?;
        self.interfaces.push(Plugged {
            name: name.clone(),
            index: interface.index,
            tap,
        });
        let redirected = filters::redirect(netlink, interface.index, tap);
        traffic_control(redirected, name, step)?;
        Ok(TapDescriptors { queues, vhost })
    }
}

/// Lets a tap's guest send from its interface's addresses only.
fn guard(netlink: &mut Netlink, tap: u32, interface: &ObservedInterface) -> Result<()> {
    let name = &interface.name;
    let step = "checking what its guest sends";
    traffic_control(filters::prepare(netlink, tap), name, step)?;
    let addresses = interface.addresses.iter().map(|address| address.ip);
    let guarded = filters::redirect_own(netlink, tap, interface.index, interface.mac, addresses);
    traffic_control(guarded, name, step)
}

/// Pairs of queues for each of so many interfaces, 1 or more.
fn queue_pairs(vcpus: u8, interfaces: usize) -> u8 {
    // Each pair has a descriptor of the tap, and one of vhost-net.
    let fit = MOST_DESCRIPTORS / (2 * interfaces.max(1));
    let fit = u8::try_from(fit).unwrap_or(MAX_QUEUE_PAIRS);
    vcpus.min(MAX_QUEUE_PAIRS).min(fit).max(1)
}

/// Makes a new tap like its interface and brings it up. Returns its index.
fn shape_tap(netlink: &mut Netlink, tap: &str, interface: &ObservedInterface) -> Result<u32> {
    let name = &interface.name;
    let links = netlink.links().doing("listing interfaces")?;
    let index = links
        .iter()
        .find(|link| name_of(link) == Some(tap))
        .map(|link| link.header.index)
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        .doing_to(name, "finding its tap")?;
    // The host's kernel is to say nothing to the guest through it: no router solicitations.
    let silent = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
        vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
    )])];
    match netlink.set_link(index, silent) {
        // No IPv6 at all.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
        set => set.doing_to(name, "keeping IPv6 off its tap")?,
    }
    netlink
        .set_link(index, vec![LinkAttribute::Mtu(interface.mtu)])
        .doing_to(name, "setting the MTU of its tap")?;
    netlink
        .set_up(index, true)
        .doing_to(name, "bringing its tap up")?;
    Ok(index)
}

/// An error of traffic control, which says ENOENT for a kind of which there is no module.
fn traffic_control(outcome: io::Result<()>, interface: &str, step: &'static str) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(WiringError::NoTrafficControl {
                interface: interface.into(),
                step,
            })
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(WiringError::Taken(interface.into()))
        }
        outcome => outcome.doing_to(interface, step),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_has_a_queue_pair_as_long_as_descriptors_suffice() {
        assert_eq!(
            [0, 1, 4, 64].map(|vcpus| queue_pairs(vcpus, 1)),
            [1, 1, 4, 8]
        );
        assert_eq!(
            [6, 7, 32, 1000].map(|count| queue_pairs(64, count)),
            [8, 6, 1, 1]
        );
    }
}
