//! What an order adds to a bucket.

use super::decimal::{Decimal, scaled_to_f64};

/// Places of an exact amount: those of a price and of a quantity together.
const PLACES: usize = 16;

/// An amount of USD: the product of an order's average price and its filled quantity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Usd {
    /// Exactly this, in units of 10⁻¹⁶.
    Exact(i128),
    /// About this: beyond 10²², or of numbers with more places than eight.
    Rounded(f64),
    /// The order lacks a number.
    #[default]
    Unknown,
}

impl Usd {
    /// The product of a price and a quantity.
    #[must_use]
    pub fn of(price: Option<Decimal>, quantity: Option<Decimal>) -> Self {
        let (Some(price), Some(quantity)) = (price, quantity) else { return Self::Unknown };
        price.product(quantity).map_or_else(|| Self::Rounded(price.to_f64() * quantity.to_f64()), Self::Exact)
    }

    /// The sum of two amounts; what is unknown counts for nothing.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown, known) | (known, Self::Unknown) => known,
            (Self::Exact(one), Self::Exact(two)) => {
                one.checked_add(two).map_or_else(|| Self::Rounded(self.nearest() + other.nearest()), Self::Exact)
            }
            _ => Self::Rounded(self.nearest() + other.nearest()),
        }
    }

    /// The nearest double; zero for what is unknown.
    #[must_use]
    pub fn nearest(self) -> f64 {
        match self {
            Self::Exact(value) => scaled_to_f64(value, PLACES),
            Self::Rounded(value) => value,
            Self::Unknown => 0.0,
        }
    }
}
