// Runs CUDA threads on the CPU, each as a fiber, so that barriers, shuffles and shared memory do what they do on a GPU.
//
// What a GPU would not forgive is reported: a barrier that some threads never reach, an access outside of a buffer
// (buffers end at a page that cannot be touched), a misaligned access (the compiler's sanitizer). Shared memory starts as
// NaN, and the order in which threads and blocks run is drawn from a seed, so that a missing barrier shows.

#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace shim {

constexpr std::size_t kStack = 64 * 1024;

// Opens, and closes again, each time that all its members have come.
struct Gate {
  unsigned members = 0;
  unsigned arrived = 0;
  unsigned opened = 0;
};

struct Warp {
  Gate gate;
  float values[2][kLanes];  // two, so that who is early cannot overwrite what others have yet to read
};

struct Fiber : Thread {
  ucontext_t context;
  Gate* waiting = nullptr;
  unsigned seen = 0;
  bool done = false;
};

// Memory that ends where a page begins that nobody may touch.
class Guarded {
 public:
  explicit Guarded(std::size_t wanted) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (wanted + page - 1) / page * page;
    all_ = bytes_ + page;
    start_ = static_cast<char*>(
        mmap(nullptr, all_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(end(), page, PROT_NONE);
  }
  ~Guarded() { munmap(start_, all_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* start() const { return start_; }
  char* end() const { return start_ + bytes_; }
  void poison() { std::memset(start_, 0xff, bytes_); }

 private:
  char* start_;
  std::size_t bytes_, all_;
};

Thread* current = nullptr;
Dim grid;

static ucontext_t scheduler;
static const Entry* entry = nullptr;
static Gate block_gate;
static std::vector<Warp> warps;  // of the block
static std::unique_ptr<Guarded> shared;
static std::unique_ptr<Guarded> stacks;
static std::mt19937 random_order;
static void** given = nullptr;
static sigjmp_buf escape;

static Fiber& self() { return *static_cast<Fiber*>(current); }

static void meet(Gate& gate) {
  if (++gate.arrived == gate.members) {
    gate.arrived = 0;
    ++gate.opened;
    return;
  }
  Fiber& fiber = self();
  fiber.waiting = &gate;
  fiber.seen = gate.opened;
  swapcontext(&fiber.context, &scheduler);
}

float exchange(float value, int offset) {
  const unsigned thread = current->thread.x;
  Warp& warp = warps[thread / kLanes];
  float* values = warp.values[warp.gate.opened % 2];
  values[thread % kLanes] = value;
  meet(warp.gate);
  return values[(thread % kLanes) ^ offset];
}

void block_sync() { meet(block_gate); }

static void run_fiber() {
  entry->body(given);
  self().done = true;
  swapcontext(&self().context, &scheduler);
}

static std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_order);
  return order;
}

// All threads of one block, until each has finished. False where nobody can go on.
static bool run_block(unsigned block) {
  const unsigned threads = entry->threads;
  block_gate = Gate{threads, 0, 0};
  warps.assign(threads / kLanes, Warp{});
  for (Warp& warp : warps) warp.gate.members = kLanes;
  shared->poison();
  std::vector<Fiber> fibers(threads);
  for (unsigned each = 0; each < threads; ++each) {
    Fiber& fiber = fibers[each];
    fiber.thread.x = each;
    fiber.block.x = block;
    fiber.shared = shared->end() - kSharedBytes;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks->start() + each * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const std::vector<unsigned> order = shuffled(threads / kLanes), lanes = shuffled(kLanes);
  for (std::size_t unfinished = threads; unfinished > 0;) {
    bool moved = false;
    for (const unsigned warp : order) {
      // A warp runs on until it is stuck, so that it is as far ahead of the others as the barriers allow.
      for (bool stuck = false; !stuck;) {
        stuck = true;
        for (const unsigned lane : lanes) {
          Fiber& fiber = fibers[warp * kLanes + lane];
          if (fiber.done || (fiber.waiting && fiber.waiting->opened == fiber.seen)) continue;
          fiber.waiting = nullptr;
          current = &fiber;
          swapcontext(&scheduler, &fiber.context);
          stuck = false;
          moved = true;
          if (fiber.done) --unfinished;
        }
      }
    }
    if (!moved) return false;
  }
  return true;
}

// 1 where all blocks finish.
static int run_grid() {
  for (const unsigned each : shuffled(grid.x)) {
    if (!run_block(each)) return 0;
  }
  return 1;
}

static void caught(int signal) { siglongjmp(escape, signal); }

// What `run` says, or the signal that ended it, negative.
static int guarded_run(int (*run)()) {
  constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction action = {}, before[3];
  action.sa_handler = caught;
  for (int each = 0; each < 3; ++each) sigaction(kSignals[each], &action, &before[each]);
  const int signal = sigsetjmp(escape, 1);
  const int result = signal == 0 ? run() : -signal;
  for (int each = 0; each < 3; ++each) sigaction(kSignals[each], &before[each], nullptr);
  return result;
}

static int fail(char* message, const std::string& reason) {
  std::snprintf(message, 200, "%s", reason.c_str());
  return 1;
}

}  // namespace shim

// As cuLaunchKernel takes it: `parameters` points to each parameter. 0, or 1 with a reason in `message` [200].
extern "C" int shim_launch(const char* name, unsigned grid, unsigned threads, void** parameters, unsigned seed,
                           char* message) {
  using namespace shim;
  entry = entries;
  while (entry->name && std::strcmp(entry->name, name) != 0) ++entry;
  if (!entry->name) return fail(message, std::string("there is no kernel ") + name);
  if (grid == 0) return fail(message, "the grid is empty");
  if (threads != entry->threads) return fail(message, "not the threads that the kernel is compiled for");
  given = parameters;
  shim::grid.x = grid;
  random_order.seed(seed);
  stacks = std::make_unique<Guarded>(static_cast<std::size_t>(threads) * kStack);
  shared = std::make_unique<Guarded>(kSharedBytes);
  const int result = guarded_run(run_grid);
  if (result == -SIGILL) return fail(message, "undefined behaviour, such as a misaligned access");
  if (result < 0) return fail(message, "an access outside of a buffer");
  if (result == 0) return fail(message, "some threads wait at a barrier that others never reach");
  return 0;
}

float half_to_float(unsigned short bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31   ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

unsigned short float_to_half(float value) {
  const unsigned sign = (__float_as_uint(value) >> 16) & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<unsigned short>(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return static_cast<unsigned short>(sign | 0x7c00u);
  // In units of the last place, where rint rounds to nearest, ties to even; a carry moves into the exponent by itself.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<unsigned>(std::rint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<unsigned short>(sign | (static_cast<unsigned>(exponent + 14) * 1024u + units));
}
