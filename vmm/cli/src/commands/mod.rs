//! The commands, each in a file of its own.

pub mod attach_container;
pub mod check;
pub mod completion;
pub mod events;
pub mod exec;
pub mod gc;
pub mod images;
pub mod inspect;
pub mod kill;
pub mod load;
pub mod logs;
pub mod monitor;
pub mod network;
pub mod pause;
pub mod port_forward;
pub mod ps;
pub mod rm;
pub mod rmi;
pub mod run;
pub mod snapshot;
pub mod stop;
pub mod supervise;
pub mod template;
pub mod timeline;
pub mod wait;
