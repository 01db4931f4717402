#![doc = include_str!("protocol.md")]

pub mod local;
pub mod moment;
pub mod selection;
#[cfg(test)]
mod simulator;
pub mod view;

pub use local::{Effect, Purge, Validity, Voids};
pub use moment::Moment;
pub use selection::{ORDERS, Selection, glob};
