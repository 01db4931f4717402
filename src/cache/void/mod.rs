#![doc = include_str!("protocol.md")]

pub mod effect;
pub mod local;
pub mod moment;
pub mod selection;
#[cfg(test)]
mod simulator;
pub mod view;

pub use effect::Effect;
pub use local::{Purge, Validity, Voids};
pub use moment::Moment;
pub use selection::{ORDERS, Selection, glob};
