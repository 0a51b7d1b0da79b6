//! What changes while a driver runs: taps, addresses, queue pairs; and limits.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::*;
use crate::config::{DirectionLimits, RateLimit};
use crate::devices::net::pair::BELL;
use crate::devices::worker::{Events, Handler, Readiness};

#[test]
fn a_tap_plugged_late_brings_the_link_up() {
    let (backend, host) = tap(false);
    let mut interface = Interface::new(&config(1, NetLimits::default()), None);
    interface.start(RING_FEATURES | features::ALWAYS);
    interface.post(BUFFERS + 0x2000, 2048);
    interface.send([0; HEADER], &[1; 60]);
    let before = (interface.config()[6], interface.net.config_changes());

    interface.handle.0.plug(vec![backend]).unwrap();
    interface.config_interrupts.wait();
    interface.send([0; HEADER], &[2; 60]);
    host.send([0; 10], &[3; 60]);
    interface.queues[0].wait_used();

    assert_eq!(before, (0, 0));
    assert_eq!(interface.config()[6], 1);
    assert_eq!(interface.net.config_changes(), 1);
    assert_eq!(host.receive().1, [2; 60]);
    assert_eq!(interface.read(BUFFERS + 0x2000 + 12, 60), [3; 60]);
    assert_eq!(interface.counted(), [0, 1, 0, 0]);
}

#[test]
fn a_second_tap_is_refused() {
    let (interface, _host) = running(LINUX);

    let result = interface.handle.0.plug(vec![tap(true).0]);

    assert_eq!(result, Err(PlugRefused::Plugged));
}

#[test]
fn a_tap_that_is_gone_takes_the_link_down_and_another_can_come() {
    let (gone, host) = tap(false);
    let mut interface = Interface::new(&config(1, NetLimits::default()), Some(vec![gone]));
    interface.start(RING_FEATURES | features::ALWAYS);

    drop(host);
    interface.config_interrupts.wait();
    let down = interface.config()[6];
    let (backend, host) = tap(false);
    interface.handle.0.plug(vec![backend]).unwrap();
    interface.config_interrupts.wait();
    interface.send([0; HEADER], &[2; 60]);

    assert_eq!(down, 0);
    assert_eq!(host.receive().1, [2; 60]);
}

#[test]
fn the_driver_may_take_another_address_until_it_is_reset() {
    let (mut interface, _host) = running(LINUX);

    let status = interface.command(2, &[1, 1, 6, 5, 4, 3, 2, 1]);
    let taken = interface.config();
    interface.net.reset();

    assert_eq!(status, 0);
    assert_eq!(taken[..6], [6, 5, 4, 3, 2, 1]);
    assert_eq!(interface.config()[..6], MAC);
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let (mut interface, _host) = running(LINUX);
    let commands: [&[u8]; 7] = [
        &[1, 1, 6, 5, 4, 3, 2],
        &[4, 0, 0, 0],
        &[4, 0, 2, 0],
        &[4, 0, 1, 0, 0],
        &[0, 0, 1],
        &[1],
        &[0xff; 64],
    ];

    let statuses = commands.map(|command| interface.command(2, command));

    assert_eq!(statuses, [1; 7]);
    assert_eq!(interface.config()[..6], MAC);
}

#[test]
fn queue_pairs_come_into_use_and_go_out_of_it() {
    let (backends, hosts): (Vec<_>, Vec<_>) = (0..2).map(|_| tap(true)).unzip();
    let mut interface = Interface::new(&config(2, NetLimits::default()), Some(backends));
    interface.start(LINUX | features::MQ);
    hosts[1].send([0; 10], &[1; 60]);
    interface.queues[2].offer(&[], &[(BUFFERS, 2048)]);

    let two = interface.command(4, &[4, 0, 2, 0]);
    interface.queues[2].wait_used();
    let one = interface.command(4, &[4, 0, 1, 0]);
    let three = interface.command(4, &[4, 0, 3, 0]);

    assert_eq!([two, one, three], [0, 0, 1]);
    let attached = |host: &Host| host.told.lock().unwrap().attached.clone();
    // At the start, and with each change.
    assert!(!attached(&hosts[1])[0]);
    assert!(attached(&hosts[1]).contains(&true));
    assert_eq!(attached(&hosts[1]).last(), Some(&false));
    assert!(attached(&hosts[0]).iter().all(|attached| *attached));
}

#[test]
fn a_driver_that_changes_its_mind_all_the_time_is_refused_for_a_while() {
    let (backends, hosts): (Vec<_>, Vec<_>) = (0..2).map(|_| tap(true)).unzip();
    let mut interface = Interface::new(&config(2, NetLimits::default()), Some(backends));
    interface.start(LINUX | features::MQ);

    let statuses: Vec<_> = (0..100)
        .map(|turn| interface.command(4, &[4, 0, 2 - turn % 2, 0]))
        .collect();

    assert_eq!(statuses[..16], [0; 16]);
    assert!(statuses.contains(&1));
    assert!(hosts[1].told.lock().unwrap().attached.len() < 100);
}

#[test]
fn without_the_multiqueue_feature_the_control_queue_is_the_third() {
    let (backends, _hosts): (Vec<_>, Vec<_>) = (0..2).map(|_| tap(true)).unzip();
    let mut interface = Interface::new(&config(2, NetLimits::default()), Some(backends));
    interface.start(LINUX);

    assert_eq!(interface.command(2, &[1, 1, 6, 5, 4, 3, 2, 1]), 0);
}

#[test]
fn limits_hold_both_ways() {
    let rate = RateLimit {
        per_second: NonZeroU64::new(1000).unwrap(),
        burst: 1,
    };
    let direction = DirectionLimits {
        bandwidth: Some(rate),
        packets: None,
    };
    let limits = NetLimits {
        receive: direction,
        transmit: direction,
    };
    let (backend, host) = tap(true);
    let mut interface = Interface::new(&config(1, limits), Some(vec![backend]));
    interface.start(LINUX);
    let started = Instant::now();

    // The first of each passes on credit, the third waits for the debt of two.
    for _ in 0..3 {
        interface.post(BUFFERS + 0x4000, 2048);
        host.send([0; 10], &[1; 100]);
        interface.send([0; HEADER], &[2; 100]);
    }
    for _ in 0..3 {
        interface.queues[0].wait_used();
        host.receive();
    }

    assert!(started.elapsed() >= Duration::from_millis(190));
}

/// A driver sends as soon as it hears of its link.
#[test]
fn the_driver_hears_of_a_tap_when_all_its_pairs_have_it() {
    let interface = Interface::new(&config(2, NetLimits::default()), None);
    let mut activation = interface.activation(LINUX | features::MQ);
    let heard = Interrupts::new();
    activation.config_interrupt = heard.clone();
    let mut pairs = interface.net.queue_pairs(activation).unwrap();
    interface.net.link.driver_up(2, heard.clone());
    let events = [Events::new().unwrap(), Events::new().unwrap()];
    for (pair, events) in pairs.iter_mut().zip(&events) {
        pair.start(events).unwrap();
    }
    let (backends, _hosts): (Vec<_>, Vec<_>) = (0..2).map(|_| tap(true)).unzip();

    interface.handle.0.plug(backends).unwrap();
    let at_once = heard.take();
    pairs[1].ready(&events[1], BELL, Readiness::IN).unwrap();
    let of_one = heard.take();
    pairs[0].ready(&events[0], BELL, Readiness::IN).unwrap();

    assert!(!at_once);
    assert!(!of_one);
    assert!(heard.take());
    assert_eq!(interface.config()[6], 1);
}

#[test]
fn a_tap_is_set_up_for_each_driver() {
    let (mut interface, host) = running(LINUX);

    interface.net.reset();
    interface.start(0);

    assert_eq!(host.told.lock().unwrap().offload[1..], [0x67, 0]);
}
