//! Random numbers that come again with the same seed, which is never 0.

/// Throws that can be thrown again.
pub struct Dice(pub u64);

impl Dice {
    /// One of the numbers below the bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
