// Fibers, their barriers, and the scheduler that draws who runs next.
#include "emulator/simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace tde::simt {
namespace {

constexpr std::size_t kStack = 256 << 10, kLargestExchange = 64, kGuard = 4096, kAlignment = 1024;
constexpr unsigned kGridLimit = 65535;  // in y and z
constexpr int kResident = 3;            // blocks that run beside one another
constexpr unsigned char kNaN = 0xff, kGuardByte = 0xa5;

// A stack as AddressSanitizer knows it, which is to be told of every change from one to another.
struct Stack {
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* kept = nullptr;  // what it remembers of a stack that is left

#ifdef __SANITIZE_ADDRESS__
  void leave_for(const Stack& next) { __sanitizer_start_switch_fiber(&kept, next.bottom, next.size); }
  void arrive_from(Stack& before) { __sanitizer_finish_switch_fiber(kept, &before.bottom, &before.size); }
#else
  void leave_for(const Stack&) {}
  void arrive_from(Stack&) {}
#endif
};

struct Block;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  Stack bounds;
  std::unique_ptr<char[]> stack;
  bool started = false;
  Block* block = nullptr;
  Position position;
  unsigned exchanges = 0;
  Deferred copies, products;
};

struct Warp {
  std::vector<Fiber*> waiting;
  // in turns: nobody is a whole exchange ahead of a lane that still reads
  alignas(16) unsigned char slots[2][kWarp * kLargestExchange];
};

// A block while it is resident.
struct Block {
  std::deque<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier;
  std::vector<std::pair<Fiber*, std::function<bool()>>> watching;  // and what they wait for
  std::vector<std::function<void()>> under_way;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  unsigned threads = 0, running = 0;

  void prepare(unsigned threads, std::size_t shared_bytes);
  void begin(uint3 index, dim3 grid, std::size_t shared_bytes);
  bool kept_within(std::size_t shared_bytes) const;
  bool advance(std::mt19937& random, std::vector<Fiber*>& ready);
};

// One of the things under way happens, if any; whether something did. Who waited for it goes on.
bool Block::advance(std::mt19937& random, std::vector<Fiber*>& ready) {
  const bool any = !under_way.empty();
  if (any) {
    std::swap(under_way[random() % under_way.size()], under_way.back());
    under_way.back()();
    under_way.pop_back();
  }
  const auto held = std::partition(watching.begin(), watching.end(), [](const auto& each) { return !each.second(); });
  for (auto each = held; each != watching.end(); ++each) ready.push_back(each->first);
  const bool woken = held != watching.end();
  watching.erase(held, watching.end());
  return any || woken;
}

class Multiprocessor {
 public:
  Status run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
             const std::function<void()>& thread);

  Fiber& current() { return *current_; }
  void sync_block() { wait(current_->block->at_barrier, current_->block->threads); }
  const void* exchange(const void* mine, std::size_t bytes);
  void wait_until(std::function<bool()> holds);

  static void live();

 private:
  bool advance();
  void resume(Fiber& fiber);
  void pause();
  void wait(std::vector<Fiber*>& waiting, std::size_t wanted);

  Block blocks_[kResident];
  std::vector<Fiber*> ready_;
  Fiber* current_ = nullptr;
  const std::function<void()>* thread_ = nullptr;
  jmp_buf scheduler_;
  Stack bounds_;  // the scheduler's
  std::mt19937 random_{20201};
};

thread_local Multiprocessor multiprocessor;

// The first switch to a fiber is ucontext's, the others are jumps: ucontext makes a system call at each.
void Multiprocessor::live() {
  multiprocessor.current_->bounds.arrive_from(multiprocessor.bounds_);
  for (;;) {
    (*multiprocessor.thread_)();
    --multiprocessor.current_->block->running;
    multiprocessor.pause();
  }
}

void Multiprocessor::resume(Fiber& fiber) {
  current_ = &fiber;
  bounds_.leave_for(fiber.bounds);
  if (_setjmp(scheduler_)) return bounds_.arrive_from(fiber.bounds);
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void Multiprocessor::pause() {
  current_->bounds.leave_for(bounds_);
  if (!_setjmp(current_->place)) _longjmp(scheduler_, 1);
  current_->bounds.arrive_from(bounds_);
}

void Multiprocessor::wait(std::vector<Fiber*>& waiting, std::size_t wanted) {
  waiting.push_back(current_);
  if (waiting.size() == wanted) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  pause();
}

void Multiprocessor::wait_until(std::function<bool()> holds) {
  current_->block->watching.emplace_back(current_, std::move(holds));
  pause();
}

// Whether a fiber is ready, after what is under way has had its chance; it is forced where nobody else can go on.
bool Multiprocessor::advance() {
  constexpr unsigned kSeldom = 16;
  if (random_() % kSeldom == 0) blocks_[random_() % kResident].advance(random_, ready_);
  bool happened = true;
  while (ready_.empty() && happened) {
    happened = false;
    for (Block& block : blocks_) happened |= block.advance(random_, ready_);
  }
  return !ready_.empty();
}

const void* Multiprocessor::exchange(const void* mine, std::size_t bytes) {
  Warp& warp = current_->block->warps[current_->position.thread.x / kWarp];
  unsigned char* slots = warp.slots[current_->exchanges++ % 2];
  std::memcpy(slots + current_->position.thread.x % kWarp * bytes, mine, bytes);
  wait(warp.waiting, kWarp);
  return slots;
}

void Block::prepare(unsigned number, std::size_t shared_bytes) {
  threads = number;
  warps.resize(threads / kWarp);
  while (fibers.size() < threads) {
    Fiber& fiber = fibers.emplace_back();
    fiber.block = this;
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    fiber.bounds = {fiber.stack.get(), kStack};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, &Multiprocessor::live, 0);
  }
  memory.resize(kAlignment + shared_bytes + kGuard);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  shared = memory.data() + (kAlignment - address % kAlignment) % kAlignment;
}

void Block::begin(uint3 index, dim3 grid, std::size_t shared_bytes) {
  std::memset(shared, kNaN, shared_bytes);
  std::memset(shared + shared_bytes, kGuardByte, kGuard);
  running = threads;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.position = {{t, 0, 0}, index, dim3(threads), grid};
    fiber.exchanges = 0;
    fiber.copies = fiber.products = {};
  }
}

bool Block::kept_within(std::size_t shared_bytes) const {
  return std::all_of(shared + shared_bytes, shared + shared_bytes + kGuard,
                     [](unsigned char byte) { return byte == kGuardByte; });
}

Status Multiprocessor::run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
                           const std::function<void()>& thread) {
  if (threads == 0 || threads > 1024 || threads % kWarp != 0)
    return {what + ": " + std::to_string(threads) + " threads are not whole warps of at most 1024"};
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {what + ": an empty grid, which a device refuses"};
  if (grid.y > kGridLimit || grid.z > kGridLimit) return {what + ": a larger grid than any device has"};
  thread_ = &thread;
  std::vector<std::size_t> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random_);
  auto next = order.begin();
  const auto enter = [&](Block& block) {
    if (next == order.end()) return;
    const std::size_t i = *next++;
    block.begin({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)}, grid,
                shared_bytes);
    for (unsigned t = 0; t < threads; ++t) ready_.push_back(&block.fibers[t]);
  };
  for (Block& block : blocks_) {
    block.prepare(threads, shared_bytes);
    enter(block);
  }
  std::string wrong;
  while (wrong.empty() && advance()) {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    Fiber* fiber = ready_.back();
    ready_.pop_back();
    resume(*fiber);
    if (fiber->block->running > 0) continue;
    if (!fiber->block->kept_within(shared_bytes))
      wrong = "wrote past the end of its " + std::to_string(shared_bytes) + " bytes of shared memory";
    if (!fiber->block->under_way.empty()) wrong = "ended before what it had begun";
    enter(*fiber->block);
  }
  const auto waits = [](const Block& block) { return block.running > 0; };
  if (wrong.empty() && std::any_of(std::begin(blocks_), std::end(blocks_), waits))
    wrong = "threads wait for one another at different barriers";
  if (wrong.empty()) return {};
  ready_.clear();
  for (Block& block : blocks_) block = Block{};  // fibers that were left waiting will not come back
  return {what + ": " + wrong};
}

}  // namespace

const Position& here() { return multiprocessor.current().position; }
unsigned char* shared_memory() { return multiprocessor.current().block->shared; }
void sync_block() { multiprocessor.sync_block(); }
const void* exchange(const void* mine, std::size_t bytes) { return multiprocessor.exchange(mine, bytes); }

Deferred& copies() { return multiprocessor.current().copies; }
Deferred& products() { return multiprocessor.current().products; }
void sometime(std::function<void()> happens) {
  multiprocessor.current().block->under_way.push_back(std::move(happens));
}
void wait_until(std::function<bool()> holds) { multiprocessor.wait_until(std::move(holds)); }

Status run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
           const std::function<void()>& thread) {
  return multiprocessor.run(what, grid, threads, shared_bytes, thread);
}

}  // namespace tde::simt
