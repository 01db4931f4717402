//! The API as its clients saw it: the contract's recorded answers.

use std::collections::HashMap;
use std::path::PathBuf;

/// One line of the recorded contract.
#[derive(Clone, serde::Deserialize)]
pub struct Recorded {
    pub method: String,
    pub target: String,
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
    /// The rule by which native mode answers differently.
    pub deviates: Option<String>,
}

/// Where the contract's data is.
pub fn recorded_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/contract")
}

pub fn recorded() -> Vec<Recorded> {
    include_str!("../../contract/golden.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
