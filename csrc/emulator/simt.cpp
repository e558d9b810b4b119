// Fibers, their barriers, and the scheduler that draws who runs next.
#include "emulator/simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace tde::simt {
namespace {

constexpr std::size_t kStack = 256 << 10, kLargestExchange = 64, kGuard = 4096, kAlignment = 128;
constexpr unsigned char kNaN = 0xff, kGuardByte = 0xa5;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false;
  bool done = false;
  Position position;
  unsigned exchanges = 0;
  std::vector<Copy> open;                // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // the oldest first
};

struct Warp {
  std::vector<Fiber*> waiting;
  // in turns: nobody is a whole exchange ahead of a lane that still reads
  alignas(16) unsigned char slots[2][kWarp * kLargestExchange];
};

class Multiprocessor {
 public:
  Status run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
             const std::function<void()>& thread);

  Fiber& current() { return *current_; }
  unsigned char* shared() { return shared_; }
  void sync_block();
  const void* exchange(const void* mine, std::size_t bytes);

 private:
  static void live();
  void prepare(unsigned threads, std::size_t shared_bytes);
  bool run_block();
  void resume(Fiber& fiber);
  void pause();
  void wait(std::vector<Fiber*>& waiting, std::size_t wanted);

  std::deque<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Fiber*> ready_, at_block_barrier_;
  std::vector<unsigned char> memory_;
  unsigned char* shared_ = nullptr;
  unsigned threads_ = 0;
  Fiber* current_ = nullptr;
  const std::function<void()>* thread_ = nullptr;
  jmp_buf scheduler_;
  std::mt19937 random_{20201};
};

thread_local Multiprocessor multiprocessor;

// The first switch to a fiber is ucontext's, the others are jumps: ucontext makes a system call at each.
void Multiprocessor::live() {
  for (;;) {
    (*multiprocessor.thread_)();
    multiprocessor.current_->done = true;
    multiprocessor.pause();
  }
}

void Multiprocessor::resume(Fiber& fiber) {
  current_ = &fiber;
  if (_setjmp(scheduler_)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void Multiprocessor::pause() {
  if (!_setjmp(current_->place)) _longjmp(scheduler_, 1);
}

void Multiprocessor::wait(std::vector<Fiber*>& waiting, std::size_t wanted) {
  waiting.push_back(current_);
  if (waiting.size() == wanted) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  pause();
}

void Multiprocessor::sync_block() { wait(at_block_barrier_, threads_); }

const void* Multiprocessor::exchange(const void* mine, std::size_t bytes) {
  Warp& warp = warps_[current_->position.thread.x / kWarp];
  unsigned char* slots = warp.slots[current_->exchanges++ % 2];
  std::memcpy(slots + current_->position.thread.x % kWarp * bytes, mine, bytes);
  wait(warp.waiting, kWarp);
  return slots;
}

void Multiprocessor::prepare(unsigned threads, std::size_t shared_bytes) {
  threads_ = threads;
  warps_.resize(threads / kWarp);
  while (fibers_.size() < threads) {
    Fiber& fiber = fibers_.emplace_back();
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    getcontext(&fiber.start);
    fiber.start.uc_stack = {fiber.stack.get(), 0, kStack};
    makecontext(&fiber.start, &Multiprocessor::live, 0);
  }
  memory_.resize(kAlignment + shared_bytes + kGuard);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data());
  shared_ = memory_.data() + (kAlignment - address % kAlignment) % kAlignment;
}

// Whether every thread came to its end.
bool Multiprocessor::run_block() {
  ready_.clear();
  at_block_barrier_.clear();
  for (Warp& warp : warps_) warp.waiting.clear();
  for (unsigned t = 0; t < threads_; ++t) ready_.push_back(&fibers_[t]);
  while (!ready_.empty()) {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    Fiber* next = ready_.back();
    ready_.pop_back();
    resume(*next);
  }
  return std::all_of(fibers_.begin(), fibers_.begin() + threads_, [](const Fiber& f) { return f.done; });
}

Status Multiprocessor::run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
                           const std::function<void()>& thread) {
  if (threads == 0 || threads > 1024 || threads % kWarp != 0)
    return {what + ": " + std::to_string(threads) + " threads are not whole warps of at most 1024"};
  prepare(threads, shared_bytes);
  thread_ = &thread;
  std::vector<std::size_t> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random_);
  for (const std::size_t block : order) {
    const uint3 index{unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
    std::memset(shared_, kNaN, shared_bytes);
    std::memset(shared_ + shared_bytes, kGuardByte, kGuard);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.position = {{t, 0, 0}, index, dim3(threads), grid};
      fiber.done = false;
      fiber.exchanges = 0;
      fiber.open.clear();
      fiber.groups.clear();
    }
    if (!run_block()) {
      fibers_.clear();  // those left waiting will not come back
      return {what + ": threads wait for one another at different barriers"};
    }
    if (!std::all_of(shared_ + shared_bytes, shared_ + shared_bytes + kGuard,
                     [](unsigned char byte) { return byte == kGuardByte; }))
      return {what + ": wrote past the end of its " + std::to_string(shared_bytes) + " bytes of shared memory"};
  }
  return {};
}

}  // namespace

const Position& here() { return multiprocessor.current().position; }
unsigned char* shared_memory() { return multiprocessor.shared(); }
void sync_block() { multiprocessor.sync_block(); }
const void* exchange(const void* mine, std::size_t bytes) { return multiprocessor.exchange(mine, bytes); }

void copy_later(void* to, const void* from, std::size_t bytes) {
  multiprocessor.current().open.push_back({to, from, bytes});
}

void commit_copies() {
  Fiber& fiber = multiprocessor.current();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_copies(std::size_t groups_left) {
  auto& groups = multiprocessor.current().groups;
  for (; groups.size() > groups_left; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

Status run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
           const std::function<void()>& thread) {
  return multiprocessor.run(what, grid, threads, shared_bytes, thread);
}

}  // namespace tde::simt
