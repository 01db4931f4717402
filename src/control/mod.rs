//! What changes while the program runs: the rules, read again from the configuration file.
//!
//! Knows the configuration, and the proxy whose rules it exchanges. Knows nothing of who asks for it.

pub mod anew;
pub mod reload;
pub mod watch;
