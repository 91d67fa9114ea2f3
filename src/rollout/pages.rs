//! Pages of the KV cache: who holds which. Pure bookkeeping.

/// Pages with reference counts.
#[derive(Debug, Clone)]
pub struct PagePool {
    free: Vec<u32>,
    holders: Vec<u32>,
}

impl PagePool {
    /// A pool of free pages.
    pub fn new(num_pages: usize) -> Self {
        PagePool { free: (0..num_pages as u32).rev().collect(), holders: vec![0; num_pages] }
    }

    /// Takes a free page.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.holders[page as usize] = 1;
        Some(page)
    }

    /// Adds a holder to a page that is held.
    pub fn share(&mut self, page: u32) {
        assert!(self.holders[page as usize] > 0, "only held pages are shared");
        self.holders[page as usize] += 1;
    }

    /// Gives a page back; it is free when its last holder has.
    pub fn give_back(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "only held pages are given back");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    /// Number of free pages.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Number of holders of a page.
    pub fn holders(&self, page: u32) -> u32 {
        self.holders[page as usize]
    }
}
