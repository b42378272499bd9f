// How the CUDA emulator (tests only) runs a grid: blocks and threads in the order of the schedule, barriers and warp
// operations completed when all their threads are there, and a report when they never will be.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/simt_machine.h"

namespace kantor::simt::emulator {

inline void Machine::launch(dim3 grid_size, dim3 block_size, std::size_t dynamic_bytes, void (*body)(void*),
                            void* arguments) {
  if (active) throw LaunchError("a kernel launched a kernel");
  const auto threads = std::uint64_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > 1024 || block_size.z > 64) {
    throw LaunchError("a block of " + std::to_string(threads) + " threads, expected 1 to 1024 with z <= 64");
  }
  if (grid_size.x > 0x7fffffffu || grid_size.y > 65535 || grid_size.z > 65535) {
    throw LaunchError("a grid larger than 2147483647 x 65535 x 65535 blocks");
  }
  if (dynamic_bytes > max_shared_bytes) throw LaunchError("more than 227 KiB of dynamic shared memory");

  grid = grid_size;
  block = block_size;
  body_ = body;
  arguments_ = arguments;
  random_ = static_cast<unsigned>(schedule);
  dynamic_.allocate(dynamic_bytes);
  prepare_threads();

  const auto blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  // A stride prime to the number of blocks visits each block once, in an order that takes no memory.
  std::uint64_t linear = 0, stride = 1;
  if (schedule == 1) linear = stride = blocks - 1;
  if (schedule >= 2) {
    linear = random() % blocks;
    stride = blocks / 2 + random() % (blocks / 2 + 1);
    while (std::gcd(stride, blocks) != 1) ++stride;
  }
  active = this;
  try {
    for (std::uint64_t visited = 0; visited < blocks; ++visited, linear = (linear + stride) % blocks) {
      block_index = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                     static_cast<unsigned>(linear / (std::uint64_t{grid.x} * grid.y))};
      run_block();
    }
  } catch (...) {
    abandon_block();
    active = nullptr;
    throw;
  }
  active = nullptr;
}

inline void Machine::prepare_threads() {
  if (prepared_block_.x == block.x && prepared_block_.y == block.y && prepared_block_.z == block.z) return;
  prepared_block_ = block;
  threads_.resize(std::size_t{block.x} * block.y * block.z);
  for (unsigned rank = 0; rank < threads_.size(); ++rank) {
    threads_[rank].rank = rank;
    threads_[rank].index = {rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
  }
  waiting_lanes_.resize((threads_.size() + 31) / 32);
}

inline void Machine::run_block() {
  ++block_serial_;
  at_barrier_ = returned_ = 0;
  static_bytes_ = 0;
  if (dynamic_.size > 0) std::memset(dynamic_.bytes.get(), 0xCD, dynamic_.size);
  for (Thread& thread : threads_) {
    thread.fiber = nullptr;
    release(thread);
  }
  while (returned_ < threads_.size()) {
    if (released_.empty()) {
      // Only operations that wait for lanes which have returned can still complete.
      for (Thread& thread : threads_) {
        if (thread.in_warp_operation()) complete_warp_operation(thread);
      }
      if (released_.empty()) throw LaunchError("divergent barrier" + where() + ": " + census());
    }
    order_released();
    run_ready_threads();
  }
}

// Makes the released threads the next round, in the order of the schedule.
inline void Machine::order_released() {
  ready_.swap(released_);
  released_.clear();
  next_ = 0;
  if (schedule == 1) std::reverse(ready_.begin(), ready_.end());
  if (schedule >= 2) {
    for (std::size_t i = ready_.size(); i > 1; --i) std::swap(ready_[i - 1], ready_[random() % i]);
  }
}

inline void Machine::run_ready_threads() {
  while (next_ < ready_.size()) {
    current = ready_[next_++];
    if (!current->fiber) {
      if (idle_.empty()) {
        fibers_.push_back(std::make_unique<Fiber>(fiber_main, static_cast<unsigned>(fibers_.size())));
        idle_.push_back(fibers_.back().get());
      }
      current->fiber = idle_.back();
      idle_.pop_back();
    }
    switch_context(launcher_, current->fiber->context);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

// A fiber runs one thread after another and lends itself to a thread for as long as that waits.
inline void Machine::fiber_main() {
  Machine& self = *active;
  announce_fiber(self.launcher_);
  for (;;) {
    Fiber* const fiber = self.current->fiber;
    for (bool more = true; more;) {
      try {
        self.body_(self.arguments_);
      } catch (...) { self.error_ = std::current_exception(); }
      self.current->wait = Wait::returned;
      ++self.returned_;
      more = !self.error_ && self.next_ < self.ready_.size() && !self.ready_[self.next_]->fiber;
      if (more) {
        self.current = self.ready_[self.next_++];
        self.current->fiber = fiber;
      }
    }
    self.idle_.push_back(fiber);
    switch_context(fiber->context, self.launcher_);
  }
}

// After an error: threads that wait never resume, so their fibers start afresh (their locals are not destroyed).
inline void Machine::abandon_block() {
  ready_.clear();
  released_.clear();
  std::fill(waiting_lanes_.begin(), waiting_lanes_.end(), 0u);
  idle_.clear();
  for (auto& fiber : fibers_) {
    fiber->restart();
    idle_.push_back(fiber.get());
  }
}

// --- waiting ---

inline void Machine::release(Thread& thread) {
  thread.wait = Wait::none;
  released_.push_back(&thread);
}

inline void Machine::wait(Wait kind, Place place) {
  Thread& self = *current;
  self.wait = kind;
  self.place = place;
  if (kind == Wait::barrier) {
    if (++at_barrier_ == threads_.size()) complete_barrier();
  } else {
    const unsigned own = 1u << self.rank % 32;
    if ((self.mask & own) == 0) {
      throw LaunchError("a lane is missing from the mask of its own warp operation" + where() + ": " + census());
    }
    unsigned& waiting = waiting_lanes_[self.rank / 32];
    waiting |= own;
    if ((self.mask & ~waiting) == 0) complete_warp_operation(self);
  }
  switch_context(self.fiber->context, launcher_);
}

inline void Machine::complete_barrier() {
  const Place first = threads_[0].place;
  for (const Thread& thread : threads_) {
    if (thread.place.line() != first.line() || thread.place.column() != first.column()) {
      throw LaunchError("divergent barrier" + where() + ": " + census());
    }
  }
  for (Thread& thread : threads_) release(thread);
  at_barrier_ = 0;
}

// Completes the operation that `member` waits in if all lanes of its mask that have not returned are there.
inline void Machine::complete_warp_operation(const Thread& member) {
  const unsigned warp = member.rank / 32;
  Thread* const lanes = threads_.data() + warp * 32;
  const unsigned count = std::min<unsigned>(32, static_cast<unsigned>(threads_.size()) - warp * 32);
  const Wait kind = member.wait;
  const unsigned mask = member.mask;
  unsigned group = 0;
  for (unsigned lane = 0; lane < count; ++lane) {
    if (!(mask >> lane & 1u) || lanes[lane].wait == Wait::returned) continue;
    if (lanes[lane].wait != kind || lanes[lane].mask != mask) return;
    group |= 1u << lane;
  }
  if (kind == Wait::shuffle) exchange(lanes, group);
  if (kind == Wait::vote) vote(lanes, group);
  waiting_lanes_[warp] &= ~group;
  for (unsigned lane = 0; lane < count; ++lane) {
    if (group >> lane & 1u) release(lanes[lane]);
  }
}

// All lanes of a shuffle receive at once, so no lane can overtake one that has not read yet.
inline void Machine::exchange(Thread* lanes, unsigned group) const {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(group >> lane & 1u)) continue;
    const unsigned source = lanes[lane].source;
    if (!(group >> source & 1u)) {
      const bool named = lanes[lane].mask >> source & 1u;
      throw LaunchError("lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(source) +
                        (named ? ", which has returned or does not exist" : ", which is not in the mask") + where() +
                        ": " + census());
    }
    std::memcpy(lanes[lane].received, lanes[source].sent, sizeof lanes[lane].received);
  }
}

inline void Machine::vote(Thread* lanes, unsigned group) const {
  Ballot ballot{0, group};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((group >> lane & 1u) && lanes[lane].sent[0] != std::byte{0}) ballot.yes |= 1u << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (group >> lane & 1u) std::memcpy(lanes[lane].received, &ballot, sizeof ballot);
  }
}

// --- shared memory ---

inline std::byte* Machine::static_shared(SharedBuffer& buffer, std::size_t bytes) {
  if (buffer.block != block_serial_) {  // the first thread of the block to get here
    static_bytes_ += bytes;
    if (static_bytes_ > max_static_bytes) throw LaunchError("more than 48 KiB of statically sized shared memory");
    if (static_bytes_ + dynamic_.size > max_shared_bytes) throw LaunchError("more than 227 KiB of shared memory");
    buffer.allocate(bytes);
    std::memset(buffer.bytes.get(), 0xFF, bytes);
    buffer.block = block_serial_;
  }
  return buffer.bytes.get();
}

// --- reports ---

inline std::string Machine::where() const {
  const auto show = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  };
  return " in block " + show(block_index.x, block_index.y, block_index.z) + " of grid " + show(grid.x, grid.y, grid.z);
}

// "16 of 64 threads wait in __syncthreads() at kernels.h:12, 48 returned"
inline std::string Machine::census() const {
  static constexpr const char* names[] = {"", "__syncthreads()", "__syncwarp()", "a shuffle", "a vote", ""};
  std::map<std::tuple<Wait, std::string, unsigned>, unsigned> waiting;
  unsigned running = 0;
  for (const Thread& thread : threads_) {
    if (thread.wait == Wait::returned) continue;
    if (thread.wait == Wait::none) ++running;
    if (thread.wait != Wait::none) ++waiting[{thread.wait, thread.place.file_name(), thread.place.line()}];
  }
  std::string text = "of " + std::to_string(threads_.size()) + " threads";
  for (const auto& [place, count] : waiting) {
    const auto& [kind, file, line] = place;
    text += " " + std::to_string(count) + " wait in " + names[static_cast<int>(kind)] + " at " +
            file.substr(file.rfind('/') + 1) + ":" + std::to_string(line) + ",";
  }
  if (running > 0) text += " " + std::to_string(running) + " still run,";
  return text + " " + std::to_string(returned_) + " returned";
}

}  // namespace kantor::simt::emulator
