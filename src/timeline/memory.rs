//! What the allocator holds for something, in bytes: more than was asked for, since it hands out few sizes.

/// What the allocator holds for an allocation of so many bytes: the size class of jemalloc that they lie in.
#[must_use]
pub const fn allocated(bytes: usize) -> u64 {
    let class = match bytes {
        0 => 0,
        1..=8 => 8,
        9..=128 => bytes.next_multiple_of(16),
        // Four classes between two powers of two.
        _ => bytes.next_multiple_of(1 << ((bytes - 1).ilog2() - 2)),
    };
    class as u64
}

/// The same for an array of so many.
#[must_use]
pub const fn array<T>(length: usize) -> u64 {
    allocated(length.saturating_mul(size_of::<T>()))
}

/// The same for what is shared: two counts stand beside it.
#[must_use]
pub const fn shared<T>() -> u64 {
    allocated(size_of::<T>() + 16)
}

/// The same for a text that is shared.
#[must_use]
pub fn text(text: Option<&str>) -> u64 {
    text.map_or(0, |text| allocated(text.len() + 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_that_jemalloc_hands_out() {
        for (asked, given) in [
            (0, 0),
            (1, 8),
            (9, 16),
            (128, 128),
            (129, 160),
            (160, 160),
            (257, 320),
            (4097, 5120),
            (64 << 10, 64 << 10),
            ((128 << 10) - 8, 128 << 10),
            ((128 << 10) + 1, 160 << 10),
        ] {
            assert_eq!(allocated(asked), given, "{asked}");
        }
    }
}
