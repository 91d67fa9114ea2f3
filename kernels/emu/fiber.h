// Switching between stacks of one host thread.
#pragma once

namespace emu {

// A fiber that will run `entry` on this stack (lowest address and size). `entry` must not return.
void* fiber_new(unsigned char* stack, unsigned long bytes, void (*entry)());
// Handle of the stack that the host thread came with.
void* fiber_main();
// Stops the running fiber, whose handle lies in `*from`, and goes on with `to`.
extern "C" void emu_fiber_switch(void** from, void* to);

}  // namespace emu
