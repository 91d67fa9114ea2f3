//! Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
//!
//! Every draw is a pure function of (seed, purpose, a, b, position), so that no draw depends on what other parts of
//! the program drew before: a resumed run needs no generator state, and thread timing cannot shift a stream.

/// What a stream of random numbers is for; streams of different purposes never overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Gumbel noise of a sampled token: a = sequence id (low, high), b = position.
    Sample = 1,
    /// References and tasks drawn from the buffers for prompts.
    Prompt = 2,
    /// Initialisation of fresh weights.
    Init = 3,
    /// Generated programs and documents.
    Generate = 4,
    /// Evaluation.
    Eval = 5,
    /// Tests and benchmarks.
    Test = 6,
    /// Stochastic rounding of the optimiser's moments: a = step, b = parameter and moment.
    Round = 7,
}

const MUL0: u32 = 0xD251_1F53;
const MUL1: u32 = 0xCD9E_8D57;
const WEYL0: u32 = 0x9E37_79B9;
const WEYL1: u32 = 0xBB67_AE85;

/// One block of Philox4x32 with 10 rounds: four random words of a counter under a key.
#[inline(always)]
pub fn philox4x32_10(mut ctr: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(MUL0) * u64::from(ctr[0]);
        let p1 = u64::from(MUL1) * u64::from(ctr[2]);
        ctr = [(p1 >> 32) as u32 ^ ctr[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ ctr[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL0), key[1].wrapping_add(WEYL1)];
    }
    ctr
}

/// Key of a run's streams of one purpose.
#[inline]
pub fn stream_key(seed: u64, purpose: Purpose) -> [u32; 2] {
    [seed as u32 ^ (purpose as u32).wrapping_mul(0x85EB_CA6B), (seed >> 32) as u32]
}

/// A uniform number in the open interval (0, 1) from the upper 23 bits of a word, exact in f32.
#[inline(always)]
pub fn open_unit_f32(word: u32) -> f32 {
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// A sequential stream: words 0, 1, 2 and so on of (seed, purpose, a, b).
#[derive(Debug, Clone)]
pub struct Rng {
    key: [u32; 2],
    ctr: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// The stream of (seed, purpose) with index (a, b), for example (step, configuration).
    pub fn new(seed: u64, purpose: Purpose, a: u64, b: u32) -> Self {
        Rng { key: stream_key(seed, purpose), ctr: [0, b, a as u32, (a >> 32) as u32], block: [0; 4], used: 4 }
    }

    /// Next 32 random bits. The stream has 2^34 words.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.ctr, self.key);
            self.ctr[0] = self.ctr[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Uniform integer in 0..n without bias (Lemire's rejection).
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number is below 0");
        let n = n as u64;
        let threshold = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if wide as u64 >= threshold {
                return (wide >> 64) as usize;
            }
        }
    }

    /// Standard normal number (Box-Muller, cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// One element, uniformly.
    ///
    /// # Panics
    /// When `items` is empty.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// Index drawn in proportion to weights.
    ///
    /// # Panics
    /// When the weights do not have a positive finite sum.
    pub fn weighted(&mut self, weights: &[f64]) -> usize {
        let total: f64 = weights.iter().sum();
        assert!(total > 0.0 && total.is_finite(), "weights need a positive finite sum");
        let mut left = self.unit() * total;
        for (i, w) in weights.iter().enumerate() {
            left -= w;
            if left < 0.0 {
                return i;
            }
        }
        weights.iter().rposition(|w| *w > 0.0).expect("a positive sum has a positive weight")
    }

    /// `k` different indices out of 0..n, uniformly, in random order (partial Fisher-Yates).
    ///
    /// # Panics
    /// When `k > n`.
    pub fn distinct(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "cannot draw {k} different numbers out of {n}");
        let mut all: Vec<usize> = (0..n).collect();
        for i in 0..k {
            let j = i + self.below(n - i);
            all.swap(i, j);
        }
        all.truncate(k);
        all
    }

    /// Random order in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i + 1);
            items.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // Random123 1.14, tests/kat_vectors, philox4x32 10.
        let ones = u32::MAX;
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox4x32_10([ones; 4], [ones; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(
            philox4x32_10([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344], [0xA409_3822, 0x299F_31D0]),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    fn draws_stay_in_range_and_streams_differ() {
        let mut rng = Rng::new(7, Purpose::Test, 3, 4);
        let mut seen = [0usize; 5];
        for _ in 0..5_000 {
            seen[rng.below(5)] += 1;
            let u = rng.unit();
            assert!((0.0..1.0).contains(&u));
        }
        assert!(seen.iter().all(|&n| (850..1150).contains(&n)), "{seen:?}");
        assert!(open_unit_f32(0) > 0.0 && open_unit_f32(u32::MAX) < 1.0);
        let first = |p, a, b| Rng::new(7, p, a, b).next_u64();
        assert_ne!(first(Purpose::Test, 3, 4), first(Purpose::Test, 3, 5));
        assert_ne!(first(Purpose::Test, 3, 4), first(Purpose::Prompt, 3, 4));
    }

    #[test]
    fn distinct_indices_are_distinct() {
        let mut rng = Rng::new(1, Purpose::Test, 0, 0);
        let mut drawn = rng.distinct(10, 10);
        drawn.sort_unstable();
        assert_eq!(drawn, (0..10).collect::<Vec<_>>());
        assert_eq!(rng.weighted(&[0.0, 2.0, 0.0]), 1);
    }
}
