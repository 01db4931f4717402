//! What a void leaves of the entries that it concerns.

/// What a void leaves of the entries that it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Remove,
    /// They may be void, which nobody knows any more: they are fetched anew before they are used, and used only if that fails.
    Doubt,
    /// A stale response, which may be served while it is revalidated, or if that fails.
    Expire,
}

impl Effect {
    /// The effect of a purge.
    #[must_use]
    pub const fn of_purge(soft: bool) -> Self {
        if soft { Self::Expire } else { Self::Remove }
    }
}
