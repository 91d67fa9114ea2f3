// Fibers: twelve instructions on x86-64, ucontext elsewhere.
#include "fiber.h"

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)

// The callee-saved registers go on the stack; the handle of a stopped fiber is its stack pointer.
asm(R"(
.text
.globl emu_fiber_switch
.hidden emu_fiber_switch
.type emu_fiber_switch, @function
emu_fiber_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emu_fiber_switch, . - emu_fiber_switch
)");

namespace emu {

void* fiber_new(unsigned char* stack, unsigned long bytes, void (*entry)()) {
  // At the entry of a function the stack pointer is 8 below a multiple of 16.
  void** top = (void**)(stack + bytes) - 1;
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

void* fiber_main() { return nullptr; }

}  // namespace emu

#else

#include <ucontext.h>

#include <new>

extern "C" void emu_fiber_switch(void** from, void* to) {
  swapcontext((ucontext_t*)*from, (ucontext_t*)to);
}

namespace emu {

void* fiber_new(unsigned char* stack, unsigned long bytes, void (*entry)()) {
  // The context lies at the top of its own stack.
  unsigned long room = (sizeof(ucontext_t) + 63) / 64 * 64;
  auto* context = new (stack + bytes - room) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes - room;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void* fiber_main() {
  static thread_local ucontext_t context;
  return &context;
}

}  // namespace emu

#endif
