//! Values on their way to the device. A copy from ordinary memory may wait for the stream, or read what has been freed by
//! then, as the driver likes; from page-locked memory it does neither. So the host fills two page-locked blocks in turn.

use cudarc::driver::sys;

use crate::compute::launch::device::check;
use crate::error::Result;

/// Bytes of a block.
const BLOCK_BYTES: usize = 1 << 20;

/// Two page-locked blocks. Belongs to one context and one stream, which its owner makes current and names.
pub(super) struct Staging {
    blocks: Vec<Block>,
    current: usize,
    used: usize,
}

/// A block, and the event after its last copy.
struct Block {
    at: *mut u8,
    event: sys::CUevent,
}

// SAFETY: it owns its memory and its events, which any thread may use whose context is current.
unsafe impl Send for Staging {}

impl Staging {
    /// Empty blocks in the current context.
    ///
    /// # Errors
    /// When there is no memory that can be page-locked.
    pub(super) fn new() -> Result<Self> {
        let mut staging = Staging { blocks: Vec::new(), current: 0, used: 0 };
        for _ in 0..2 {
            let (mut at, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: out-pointers live for the calls. 2: no timing.
            unsafe {
                check(sys::cuMemHostAlloc(&raw mut at, BLOCK_BYTES, 0), "allocating page-locked memory")?;
                check(sys::cuEventCreate(&raw mut event, 2), "creating an event")?;
            }
            staging.blocks.push(Block { at: at.cast(), event });
        }
        Ok(staging)
    }

    /// Copies values to the device in the order of the stream; they have been read when this returns. Waits only when both
    /// blocks are full of what is still on its way.
    ///
    /// # Errors
    /// When the driver fails, or a launch before did.
    ///
    /// # Safety
    /// The context is current, the stream is always the same, and `to` has room for the values.
    pub(super) unsafe fn send(&mut self, stream: sys::CUstream, to: sys::CUdeviceptr, values: &[u8]) -> Result<()> {
        let mut rest = values;
        while !rest.is_empty() {
            if self.used == BLOCK_BYTES {
                // SAFETY: events and stream live; waiting for an event that was never recorded returns at once.
                unsafe {
                    check(sys::cuEventRecord(self.blocks[self.current].event, stream), "recording an event")?;
                    self.current ^= 1;
                    check(sys::cuEventSynchronize(self.blocks[self.current].event), "waiting for an event")?;
                }
                self.used = 0;
            }
            let (piece, later) = rest.split_at(rest.len().min(BLOCK_BYTES - self.used));
            let place = to + (values.len() - rest.len()) as u64;
            // SAFETY: the block has room for the piece behind what is used, where nothing is on its way.
            let code = unsafe {
                let from = self.blocks[self.current].at.add(self.used);
                from.copy_from_nonoverlapping(piece.as_ptr(), piece.len());
                sys::cuMemcpyHtoDAsync_v2(place, from.cast(), piece.len(), stream)
            };
            check(code, "copying to the device")?;
            self.used += piece.len();
            rest = later;
        }
        Ok(())
    }

    /// Frees the blocks.
    ///
    /// # Safety
    /// The context is current, the stream has been waited for, and nothing is sent any more.
    pub(super) unsafe fn free(&mut self) {
        for block in self.blocks.drain(..) {
            // SAFETY: allocated by `new`, freed once. Errors at the end of a device have no reader.
            unsafe {
                sys::cuEventDestroy_v2(block.event);
                sys::cuMemFreeHost(block.at.cast());
            }
        }
    }
}
