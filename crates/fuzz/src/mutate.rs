//! New inputs from old ones: bit flips, interesting numbers, dictionary words, splices, cuts and repeats.
//!
//! All randomness comes from one seed, so a run can be repeated.

use crate::INPUT_BYTES_MAX;

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same in every release.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator with this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next word.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 {
            0
        } else {
            (self.word() % n as u64) as usize
        }
    }
}

/// Numbers at the edges of ranges, where checks go wrong.
const INTERESTING: [u64; 20] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x200,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_f000,
    u64::MAX,
];

/// The inputs that mutation starts from: the seeds, which stay, and a bounded set of recent mutants.
pub struct Corpus {
    inputs: Vec<Vec<u8>>,
    seeds: usize,
    dictionary: Vec<Vec<u8>>,
}

/// Mutants kept beside the seeds, so that changes can pile up.
const MUTANTS_MAX: usize = 512;

impl Corpus {
    /// A corpus of `seeds`, never empty.
    #[must_use]
    pub fn new(mut seeds: Vec<Vec<u8>>, dictionary: &[&[u8]]) -> Self {
        seeds.push(Vec::new());
        seeds.push((0..=255).collect());
        for s in &mut seeds {
            s.truncate(INPUT_BYTES_MAX);
        }
        Self {
            seeds: seeds.len(),
            inputs: seeds,
            dictionary: dictionary.iter().map(|w| w.to_vec()).collect(),
        }
    }

    /// The seeds as they are: they run first.
    #[must_use]
    pub fn seeds(&self) -> &[Vec<u8>] {
        &self.inputs[..self.seeds]
    }

    /// The next input.
    pub fn next(&mut self, random: &mut Random) -> Vec<u8> {
        // Half from the seeds: the deep ones must not drown among mutants.
        let from = if random.below(2) == 0 {
            self.seeds
        } else {
            self.inputs.len()
        };
        let mut input = self.inputs[random.below(from)].clone();
        let rounds = 1 << random.below(6);
        for _ in 0..rounds {
            self.change(&mut input, random);
        }
        input.truncate(INPUT_BYTES_MAX);
        if random.below(16) == 0 {
            if self.inputs.len() < self.seeds + MUTANTS_MAX {
                self.inputs.push(input.clone());
            } else {
                let at = self.seeds + random.below(MUTANTS_MAX);
                self.inputs[at].clone_from(&input);
            }
        }
        input
    }

    fn change(&self, input: &mut Vec<u8>, random: &mut Random) {
        let len = input.len();
        // Headers are where formats decide: one position in two is near the start.
        let reach = if random.below(2) == 0 { len.min(256) } else { len };
        let at = random.below(reach);
        match random.below(10) {
            0 | 1 if len > 0 => input[at] ^= 1 << random.below(8),
            2 if len > 0 => input[at] = random.word() as u8,
            3 | 4 if len > 0 => {
                let width = 1 << random.below(4);
                let mut value = INTERESTING[random.below(INTERESTING.len())];
                if random.below(3) == 0 {
                    value = value.wrapping_add(random.word() % 33).wrapping_sub(16);
                }
                let little = value.to_le_bytes();
                let mut bytes = little[..width].to_vec();
                if random.below(2) == 0 {
                    bytes.reverse();
                }
                write_at(input, at, &bytes);
            }
            5 if len > 0 => {
                // Arithmetic on a byte, carried by hand mutation of its neighbours elsewhere.
                input[at] = input[at]
                    .wrapping_add((random.word() % 71) as u8)
                    .wrapping_sub(35);
            }
            6 if !self.dictionary.is_empty() => {
                let word = &self.dictionary[random.below(self.dictionary.len())];
                if random.below(2) == 0 {
                    write_at(input, at, word);
                } else {
                    insert_at(input, at, word);
                }
            }
            7 => {
                let other = &self.inputs[random.below(self.inputs.len())];
                let from = random.below(other.len());
                let n = random.below((other.len() - from).min(4096) + 1);
                let piece = other[from..from + n].to_vec();
                if random.below(2) == 0 {
                    write_at(input, at, &piece);
                } else {
                    insert_at(input, at, &piece);
                }
            }
            8 if len > 1 => {
                let longest = 1 << random.below(12);
                let n = random.below((len - at).min(longest) + 1);
                if random.below(2) == 0 {
                    input.drain(at..at + n);
                } else {
                    let piece = input[at..at + n].to_vec();
                    insert_at(input, at, &piece);
                }
            }
            9 if random.below(8) == 0 => input.truncate(at),
            _ => {
                let n = 1 + random.below(16);
                let bytes: Vec<u8> = (0..n).map(|_| random.word() as u8).collect();
                insert_at(input, at, &bytes);
            }
        }
    }
}

fn write_at(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if input.len() < at + bytes.len() {
        input.resize(at + bytes.len(), 0);
    }
    input[at..at + bytes.len()].copy_from_slice(bytes);
}

fn insert_at(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if input.len() + bytes.len() <= INPUT_BYTES_MAX {
        let at = at.min(input.len());
        input.splice(at..at, bytes.iter().copied());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_inputs_and_all_are_bounded() {
        let run = |seed| {
            let mut corpus = Corpus::new(vec![b"hello world".to_vec()], &[b"magic"]);
            let mut random = Random::new(seed);
            (0..2000).map(|_| corpus.next(&mut random)).collect::<Vec<_>>()
        };
        let (a, b, c) = (run(7), run(7), run(8));
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert!(a.iter().all(|i| i.len() <= INPUT_BYTES_MAX));
        assert!(a.iter().any(|i| i.windows(5).any(|w| w == b"magic")));
    }
}
