//! Arrays that a device reuses. A training step needs the same large arrays again and again; fresh ones from the
//! operating system cost a page fault and a clearing per 4 KiB, a fifth of a step of a small model.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Shorter arrays come from the allocator, in floats.
const MIN_LEN: usize = 1 << 14;
/// Most that lies unused, in floats: 2 GiB.
const MAX_UNUSED: usize = 1 << 29;
/// An array serves for so many times fewer floats: the lengths of a step's last piece are always new ones.
const MAX_WASTE: usize = 8;

/// Arrays that are not in use, by capacity.
#[derive(Debug, Default)]
pub struct Store(Mutex<Unused>);

#[derive(Debug, Default)]
struct Unused {
    by_capacity: BTreeMap<usize, Vec<Vec<f32>>>,
    total: usize,
}

/// Capacity of an array of `len` floats: an eighth of a power of two, so that similar lengths share arrays.
fn capacity(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 8).max(1))
}

impl Store {
    /// An array of zeros.
    pub fn zeros(self: &Arc<Self>, len: usize) -> CpuBuf {
        let mut zeros = self.scratch(len);
        zeros.fill(0.0);
        zeros
    }

    /// An array of any values.
    pub fn scratch(self: &Arc<Self>, len: usize) -> CpuBuf {
        let mut data = if len < MIN_LEN { Vec::new() } else { self.take(capacity(len)) };
        data.truncate(len);
        data.resize(len, 0.0);
        CpuBuf { data, store: self.clone() }
    }

    /// An array with these values.
    pub fn copy_of(self: &Arc<Self>, values: &[f32]) -> CpuBuf {
        let mut copy = self.scratch(values.len());
        copy.copy_from_slice(values);
        copy
    }

    /// An array of at least this capacity, as it was left or empty.
    fn take(&self, capacity: usize) -> Vec<f32> {
        let mut unused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = unused.by_capacity.range_mut(capacity..=MAX_WASTE * capacity).find_map(|(_, arrays)| arrays.pop());
        unused.total -= found.as_ref().map_or(0, Vec::capacity);
        found.unwrap_or_else(|| Vec::with_capacity(capacity))
    }

    fn give_back(&self, data: Vec<f32>) {
        let capacity = data.capacity();
        let mut unused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if capacity >= MIN_LEN && unused.total + capacity <= MAX_UNUSED {
            unused.total += capacity;
            unused.by_capacity.entry(capacity).or_default().push(data);
        }
    }
}

/// An array of f32 on the CPU.
#[derive(Debug)]
pub struct CpuBuf {
    data: Vec<f32>,
    store: Arc<Store>,
}

impl Deref for CpuBuf {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for CpuBuf {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for CpuBuf {
    fn drop(&mut self) {
        self.store.give_back(std::mem::take(&mut self.data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_used_array_comes_back_as_zeros() {
        let store = Arc::new(Store::default());
        let mut first = store.zeros(3 * MIN_LEN);
        first.fill(7.0);
        let address = first.as_ptr();
        drop(first);
        let second = store.zeros(3 * MIN_LEN - 5);
        assert_eq!(second.as_ptr(), address, "the same memory");
        assert!(second.len() == 3 * MIN_LEN - 5 && second.iter().all(|x| *x == 0.0));
        drop(second);
        let second = store.zeros(MIN_LEN + 1);
        assert_eq!((second.as_ptr(), second.len()), (address, MIN_LEN + 1), "for a shorter one, too");
        let third = store.copy_of(&second);
        assert_ne!(third.as_ptr(), address, "it is in use");
        assert_eq!(*third, *second);
    }

    #[test]
    fn capacities_waste_little() {
        for len in [MIN_LEN, MIN_LEN + 1, 100_000, 1 << 20, (1 << 20) + 1] {
            assert!(capacity(len) >= len && capacity(len) <= len + len / 4, "{len}: {}", capacity(len));
        }
    }
}
