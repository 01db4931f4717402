//! What a request says, before anybody answers it, and why it may be refused.

pub mod interim;
pub mod refusal;
pub mod target;
pub mod timestamp;
pub mod validate;
