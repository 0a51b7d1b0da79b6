//! Message-signalled interrupts and doorbells by KVM: routes, irqfds and ioeventfds.
//!
//! The machine runs with `KVM_CAP_SPLIT_IRQCHIP` and no IOAPIC pins, so the table of
//! routes holds nothing but the messages of our lines, one interrupt number each.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::pci::platform::{MsiLine, MsiMessage, Platform};

/// As many lines as KVM takes routes (`KVM_MAX_IRQ_ROUTES`).
const MAX_LINES: u32 = 4096;

/// A virtual machine's interrupt routes.
#[derive(Debug)]
pub struct KvmPlatform {
    routes: Arc<Routes>,
}

impl KvmPlatform {
    /// For a machine whose local APICs are KVM's and whose IOAPIC is nobody's.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            routes: Arc::new(Routes {
                vm,
                table: Mutex::default(),
            }),
        }
    }
}

impl Platform for KvmPlatform {
    fn msi_line(&self) -> io::Result<Arc<dyn MsiLine>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut table = self.routes.lock();
        let number = table.lines;
        if number >= MAX_LINES {
            return Err(io::Error::other("no interrupt route is left"));
        }
        table.lines += 1;
        Ok(Arc::new(KvmLine {
            routes: self.routes.clone(),
            number,
            event,
            connected: Mutex::new(false),
        }))
    }

    fn attach_doorbell(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        // Length 0: any width matches, and KVM needs not decode the instruction.
        self.routes
            .vm
            .register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }

    fn detach_doorbell(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.routes
            .vm
            .unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }

    fn hold(&self) {
        self.routes.lock().held = true;
    }

    fn connect_held(&self) -> io::Result<()> {
        let mut table = self.routes.lock();
        table.held = false;
        self.routes.commit(&table)
    }
}

#[derive(Debug)]
struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Interrupt numbers given out: 0 up to this.
    lines: u32,
    messages: BTreeMap<u32, MsiMessage>,
    /// Changes wait: KVM is told once for all of them.
    held: bool,
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives line `number` a route. KVM takes the table as a whole; when it refuses the
    /// new message, the table is what it was without this line.
    fn set(&self, number: u32, message: MsiMessage) -> io::Result<()> {
        let mut table = self.lock();
        if table.messages.insert(number, message) == Some(message) {
            return Ok(());
        }
        if table.held {
            return Ok(());
        }
        let result = self.commit(&table);
        if result.is_err() {
            table.messages.remove(&number);
            self.commit(&table)?;
        }
        result
    }

    fn commit(&self, table: &Table) -> io::Result<()> {
        let entries: Vec<_> = table
            .messages
            .iter()
            .map(|(&number, message)| route(number, *message))
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))?;
        self.vm.set_gsi_routing(&routing).map_err(io::Error::from)
    }
}

fn route(number: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "KVM takes the address in halves"
    )]
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { devid: 0 },
    };
    kvm_irq_routing_entry {
        gsi: number,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: 0,
        pad: 0,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
    }
}

/// An eventfd that KVM reads while the line is connected.
#[derive(Debug)]
struct KvmLine {
    routes: Arc<Routes>,
    number: u32,
    event: EventFd,
    connected: Mutex<bool>,
}

impl MsiLine for KvmLine {
    fn connect(&self, message: MsiMessage) -> io::Result<()> {
        let mut connected = self
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = self.routes.set(self.number, message) {
            if *connected {
                self.routes.vm.unregister_irqfd(&self.event, self.number)?;
                *connected = false;
            }
            return Err(error);
        }
        if !*connected {
            // KVM delivers what the eventfd already holds.
            self.routes.vm.register_irqfd(&self.event, self.number)?;
            *connected = true;
        }
        Ok(())
    }

    fn disconnect(&self) -> io::Result<()> {
        let mut connected = self
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *connected {
            self.routes.vm.unregister_irqfd(&self.event, self.number)?;
            *connected = false;
        }
        Ok(())
    }

    fn signal(&self) -> io::Result<()> {
        match self.event.write(1) {
            // The counter is full, so a signal is kept already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    fn event(&self) -> Option<EventFd> {
        self.event
            .try_clone()
            .inspect_err(|error| log::warn!("an interrupt goes a longer way: {error}"))
            .ok()
    }

    fn is_pending(&self) -> bool {
        // Taken out and put back: a signal in between only adds to the counter.
        self.event.read().is_ok() && self.signal().is_ok()
    }

    fn clear(&self) {
        // Only an empty counter makes this fail, which is what is wanted.
        drop(self.event.read());
    }
}
