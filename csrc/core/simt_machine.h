// The state of the CUDA emulator (tests only): the threads of the running block, their fibers and shared memory. How
// they are scheduled is in simt_scheduler.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/simt_fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace kantor::simt::emulator {

// A kernel that a GPU would hang on, compute garbage with, or refuse to start.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Place = std::source_location;

inline constexpr std::size_t max_shared_bytes = 227 << 10;  // of one block, on sm_90
inline constexpr std::size_t max_static_bytes = 48 << 10;   // what nvcc accepts

enum class Wait : std::uint8_t { none, barrier, warp_sync, shuffle, vote, returned };

struct Thread {
  uint3 index{};
  unsigned rank = 0;  // linear index in the block: warp rank / 32, lane rank % 32
  Wait wait = Wait::none;
  unsigned mask = 0;       // of the warp operation it waits in
  unsigned source = 0;     // lane that its shuffle reads
  Place place{};           // of the call it waits in
  Fiber* fiber = nullptr;  // null until it starts
  alignas(16) std::byte sent[16]{};
  alignas(16) std::byte received[16]{};

  bool in_warp_operation() const { return wait == Wait::warp_sync || wait == Wait::shuffle || wait == Wait::vote; }
};

// What a vote (ballot, any, all) hands to each lane.
struct Ballot {
  unsigned yes, voters;
};

struct AlignedDelete {
  void operator()(std::byte* bytes) const { ::operator delete(bytes, std::align_val_t(16)); }
};

// Exactly as large as asked for, so that AddressSanitizer sees the first byte beyond.
struct SharedBuffer {
  std::unique_ptr<std::byte, AlignedDelete> bytes;
  std::size_t size = 0;
  std::uint64_t block = 0;  // serial number of the last block that used it

  void allocate(std::size_t wanted) {
    if (bytes && size == wanted) return;
    bytes.reset(static_cast<std::byte*>(::operator new(wanted, std::align_val_t(16))));
    size = wanted;
  }
};

// The emulated device of one OS thread. Fibers and buffers are kept from launch to launch.
class Machine {
 public:
  dim3 grid, block;
  uint3 block_index{};
  Thread* current = nullptr;
  int schedule = 0;

  // Runs body(arguments) once per thread of the grid; rethrows what a thread throws.
  void launch(dim3 grid_size, dim3 block_size, std::size_t dynamic_bytes, void (*body)(void*), void* arguments);

  // Suspends the current thread until the operation that it filled in (mask, source, sent) is complete.
  void wait(Wait kind, Place place);

  std::byte* static_shared(SharedBuffer& buffer, std::size_t bytes);
  std::byte* dynamic_shared() { return dynamic_.bytes.get(); }

 private:
  static void fiber_main();
  void prepare_threads();
  void run_block();
  void abandon_block();
  void run_ready_threads();
  void order_released();
  void release(Thread& thread);
  void complete_barrier();
  void complete_warp_operation(const Thread& member);
  void exchange(Thread* lanes, unsigned group) const;
  void vote(Thread* lanes, unsigned group) const;
  std::string where() const;
  std::string census() const;
  unsigned random() { return (random_ = random_ * 1664525u + 1013904223u) >> 8; }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::vector<Thread> threads_;
  std::vector<Thread*> ready_, released_;  // the current round, consumed from next_ on, and the round after it
  std::size_t next_ = 0;
  unsigned at_barrier_ = 0, returned_ = 0;
  std::vector<unsigned> waiting_lanes_;  // per warp: lanes in a warp operation
  dim3 prepared_block_{0, 0, 0};
  Context launcher_;
  SharedBuffer dynamic_;
  std::size_t static_bytes_ = 0;
  std::uint64_t block_serial_ = 0;
  unsigned random_ = 0;
  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;
  std::exception_ptr error_;
};

// The machine while it runs a kernel: a plain pointer, because every threadIdx reads it.
inline thread_local constinit Machine* active = nullptr;

inline Machine& machine() {
  static thread_local Machine instance;
  return instance;
}

inline constexpr int schedule_count = 4;

// Order of the threads and blocks in this OS thread's launches: 0 forward, 1 reverse, 2 and 3 shuffled.
inline void set_schedule(int schedule) {
  if (schedule < 0 || schedule >= schedule_count) throw std::invalid_argument("set_schedule: expected 0, 1, 2 or 3");
  machine().schedule = schedule;
}
inline int schedule() { return machine().schedule; }

}  // namespace kantor::simt::emulator
