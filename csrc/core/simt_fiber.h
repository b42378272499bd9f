// Fibers for the CUDA emulator (tests only): a stack, a saved context, and a switch that makes no system call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(KANTOR_SIMT_UCONTEXT)
#define KANTOR_SIMT_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define KANTOR_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KANTOR_SIMT_ASAN 1
#endif
#endif
#if defined(KANTOR_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kantor::simt::emulator {

// A suspended flow of control: the launcher's own, or a fiber's.
struct Context {
#if defined(KANTOR_SIMT_ASM_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine{};
#endif
  // What AddressSanitizer has to be told at each switch.
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  std::size_t stack_bytes = 0;
};

#if defined(KANTOR_SIMT_ASM_SWITCH)
#if defined(__clang__)
#define KANTOR_SIMT_OPAQUE noinline
#else
#define KANTOR_SIMT_OPAQUE noipa  // the compiler must not guess which registers the body leaves alone
#endif
// Saves the callee-saved registers of the System V ABI on the current stack, stores the stack pointer in *saved and
// continues where `restored` was saved. swapcontext() does the same and makes a system call for the signal mask. It
// jumps rather than returns: the processor predicts a return from the call it saw last, and is always wrong here.
__attribute__((naked, KANTOR_SIMT_OPAQUE, no_sanitize("address", "undefined"))) inline void switch_stack(
    [[maybe_unused]] void** saved, [[maybe_unused]] void* restored) {
  asm volatile(
      "pushq %%rbp\n\tpushq %%rbx\n\tpushq %%r12\n\tpushq %%r13\n\tpushq %%r14\n\tpushq %%r15\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%r15\n\tpopq %%r14\n\tpopq %%r13\n\tpopq %%r12\n\tpopq %%rbx\n\tpopq %%rbp\n\t"
      "popq %%rcx\n\tjmp *%%rcx" ::
          : "memory");
}
#undef KANTOR_SIMT_OPAQUE
#endif

// Suspends `from` and continues `to`; returns when something switches back to `from`.
inline void switch_context(Context& from, Context& to) {
#if defined(KANTOR_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if defined(KANTOR_SIMT_ASM_SWITCH)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(KANTOR_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fiber does; `origin` is the context that switched to it.
inline void announce_fiber([[maybe_unused]] Context& origin) {
#if defined(KANTOR_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &origin.stack_bottom, &origin.stack_bytes);
#endif
}

// A stack with a guard page below it, and the context that runs on it.
class Fiber {
 public:
  // `entry` never returns. `colour` moves the top of the stack by a few cache lines: tops a power of two apart would
  // all fall into the same few cache sets.
  Fiber(void (*entry)(), unsigned colour) : entry_(entry), colour_bytes_((colour % 32) * 128) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = usable_bytes + page;
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped_, page, PROT_NONE);  // an overflow faults instead of overwriting another fiber
    bottom_ = static_cast<std::byte*>(mapped_) + page;
    restart();
  }
  ~Fiber() { munmap(mapped_, mapped_bytes_); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets whatever ran here; the next switch begins at `entry`. Frames still on the stack are not unwound.
  void restart() {
    context = Context{};
    context.stack_bottom = bottom_;
    context.stack_bytes = usable_bytes;
#if defined(KANTOR_SIMT_ASAN)
    __asan_unpoison_memory_region(bottom_, usable_bytes);
#endif
#if defined(KANTOR_SIMT_ASM_SWITCH)
    // What switch_stack() pops: six registers and the address to go to. The ABI wants the stack pointer at
    // 8 mod 16 on entry to a function; the zero return address ends a debugger's backtrace.
    auto* top = reinterpret_cast<void**>(bottom_ + usable_bytes - colour_bytes_);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry_);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    context.stack_pointer = top;
#else
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = bottom_;
    context.machine.uc_stack.ss_size = usable_bytes - colour_bytes_;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry_, 0);
#endif
  }

  Context context;

 private:
#if defined(KANTOR_SIMT_ASAN)
  static constexpr std::size_t usable_bytes = 256 << 10;  // instrumented frames are several times larger
#else
  static constexpr std::size_t usable_bytes = 64 << 10;
#endif
  void (*entry_)();
  std::size_t colour_bytes_;
  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  std::byte* bottom_ = nullptr;
};

}  // namespace kantor::simt::emulator
