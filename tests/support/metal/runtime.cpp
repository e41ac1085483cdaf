// Runs a kernel's threads as fibers on one CPU thread, and checks every access they make.
//
// Kernels are compiled with -fsanitize=thread but never linked with its library: the callbacks at
// the end of this file take its place, so that every load and store of an unmodified kernel comes
// by here. Races are found by what barriers order, not by luck: two accesses to the same bytes, at
// least one of them a write, must have a barrier between them that fences that memory.
#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "runtime.h"

namespace {

constexpr size_t kPage = 4096, kStack = 64 << 10;
constexpr size_t kSharedLimit = 32768, kGap = 256, kMostArrays = 16;
constexpr size_t kArena = kSharedLimit + (kMostArrays + 1) * kGap;
// Bytes around a buffer that the driver keeps free, so that an access there is known for its own.
constexpr int64_t kRedZone = 1 << 16;
constexpr int kDevice = 1, kThreadgroup = 2;  // fences

struct Stop {};  // thrown in the scheduler once `failure` says why

enum class State { ready, simd, simd_barrier, barrier, done };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool begun;
  State state;
  int line, fences;
  Position position;
  alignas(16) unsigned char value[16];
};

// How many barriers have been passed, and at each how many of them fenced which memory.
struct Clock {
  uint32_t now = 0;
  std::vector<uint32_t> device{0}, shared{0};
  void tick(int fences) {
    now++;
    device.push_back(device.back() + (fences & kDevice ? 1 : 0));
    shared.push_back(shared.back() + (fences & kThreadgroup ? 1 : 0));
  }
  bool fenced_since(uint32_t then, int space) const {
    const auto& count = space == kDevice ? device : shared;
    return count[now] > count[then];
  }
};

struct Simdgroup {
  alignas(16) unsigned char values[32 * 16];
  uint32_t lanes;
  Clock clock;
};

// One thread, or the smallest unit that holds all the threads meant. Ids count 1024 threads to a
// threadgroup, so that a shift turns a thread's into its simdgroup's and its threadgroup's.
enum class Level : uint8_t { none, thread, simdgroup, threadgroup, grid };
constexpr int kShift[] = {0, 0, 5, 10, 31};
struct Who {
  Level level = Level::none;
  uint32_t id = 0;
  uint32_t at(Level up) const { return id >> (kShift[int(up)] - kShift[int(level)]); }
  bool within(Level up, uint32_t unit) const { return level <= up && at(up) == unit; }
};

// What is known of two bytes of writable memory: the last write, and the reads since.
struct Access {
  Who who;
  uint32_t barriers, simd_barriers;  // the clocks then
};
struct Cell {
  Access write, read;
  bool set;
};

struct Region {
  unsigned char* begin;
  size_t bytes;
  const char* name;
  bool writable;
  int space;
  int element;  // bytes
  std::vector<Cell> cells;
  uint64_t bytes_read;
};

struct Shared {
  size_t offset, bytes;
  const char* name;
};

struct Options {
  int32_t order, breadth, check;  // order: 0 forward, 1 reverse, 2 random
  uint32_t seed;
};

using Kernel = void (*)(void**, const Position*);
Kernel kernel_entry;
void** kernel_arguments;
Options options;
std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
Clock barriers;
std::vector<Region> buffers;
Region arena;
std::vector<Shared> shared;
alignas(16) unsigned char arena_bytes[kArena];
unsigned char* stacks;
size_t stack_count;
jmp_buf scheduler;
Fiber* running;
uint32_t threadgroup_now, random_state;
std::string failure;
std::map<std::string, std::string> findings;

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char line[500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

// The first of its kind is kept.
void find(const std::string& what, const std::string& where) { findings.emplace(what, where); }

[[noreturn]] void fail(const std::string& why) {
  failure = why;
  if (running) _longjmp(scheduler, 2);
  throw Stop{};
}

int self() { return int(running - fibers.data()); }
std::string here() { return text("thread %d of threadgroup %u", self(), threadgroup_now); }

// ---- fibers ----

void wait(State state, int line) {
  running->state = state;
  running->line = line;
  if (!_setjmp(running->jump)) _longjmp(scheduler, 1);
}

void fiber_body() {
  for (;;) {
    kernel_entry(kernel_arguments, &running->position);
    wait(State::done, 0);  // comes back as a thread of the next threadgroup
  }
}

void resume(Fiber& fiber) {
  running = &fiber;
  const int came = _setjmp(scheduler);
  if (!came) {
    fiber.state = State::ready;
    if (fiber.begun) _longjmp(fiber.jump, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + self() * kStack + kPage;
    fiber.context.uc_stack.ss_size = kStack - kPage;
    makecontext(&fiber.context, fiber_body, 0);
    setcontext(&fiber.context);
  }
  running = nullptr;
  if (came == 2) throw Stop{};
}

// ---- schedule ----

std::vector<int> in_order(int count) {
  std::vector<int> places(count);
  for (int i = 0; i < count; i++) places[i] = options.order == 1 ? count - 1 - i : i;
  if (options.order == 2)
    for (int i = count - 1; i > 0; i--) {
      random_state ^= random_state << 13, random_state ^= random_state >> 17;
      random_state ^= random_state << 5;
      std::swap(places[i], places[random_state % (i + 1)]);
    }
  return places;
}

// Runs the lanes of a simdgroup until each waits or is done; whether they can go on by themselves.
bool advance(int group) {
  const int first = group * 32, count = std::min<int>(fibers.size() - first, 32);
  for (int lane : in_order(count))
    if (fibers[first + lane].state == State::ready) resume(fibers[first + lane]);
  uint32_t together = 0, at_barrier = 0;
  const Fiber* leader = nullptr;
  for (int lane = 0; lane < count; lane++) {
    const Fiber& fiber = fibers[first + lane];
    if (fiber.state == State::barrier) at_barrier |= 1u << lane;
    if (fiber.state != State::simd && fiber.state != State::simd_barrier) continue;
    together |= 1u << lane;
    if (!leader) leader = &fiber;
    if (fiber.line != leader->line || fiber.state != leader->state)
      fail(text("divergence: lanes of simdgroup %d wait at line %d and line %d", group,
                leader->line, fiber.line));
  }
  if (!leader) return false;
  if (at_barrier)
    fail(text("divergence: lanes %08x of simdgroup %d wait at line %d, lanes %08x at a barrier",
              together, group, leader->line, at_barrier));
  if (together != ~0u)
    find("divergence: a simd operation without the whole simdgroup",
         text("line %d, lanes %08x", leader->line, together));
  Simdgroup& own = simdgroups[group];
  own.lanes = together;
  if (leader->state == State::simd_barrier) own.clock.tick(leader->fences);
  for (int lane = 0; lane < count; lane++) {
    Fiber& fiber = fibers[first + lane];
    memcpy(own.values + 16 * lane, fiber.value, 16);
    if (together >> lane & 1) fiber.state = State::ready;
  }
  return true;
}

void run_threadgroup() {
  barriers = Clock{};
  simdgroups.assign((fibers.size() + 31) / 32, Simdgroup{});
  memset(arena_bytes, 0xff, kArena);  // NaN
  if (options.check) arena.cells.assign(kArena / 2, Cell{});
  for (auto& fiber : fibers) fiber.state = State::ready;
  for (;;) {
    for (bool any = true; any;) {
      any = false;
      for (int group : in_order(simdgroups.size())) {
        bool more = advance(group);
        any |= more;
        // By depth a simdgroup runs to the barrier before the next begins: as unlike lockstep as
        // is legal. By breadth each does one simd operation in turn.
        while (more && !options.breadth) more = advance(group);
      }
    }
    const Fiber* waiting = nullptr;
    int done = 0;
    for (const Fiber& fiber : fibers) {
      if (fiber.state == State::done) {
        done++;
        continue;
      }
      if (waiting && waiting->line != fiber.line)
        fail(text("barrier divergence: threads wait at line %d and line %d", waiting->line,
                  fiber.line));
      waiting = &fiber;
    }
    if (!waiting) return;
    if (done)
      fail(text("barrier divergence: %d threads have returned, others wait at line %d", done,
                waiting->line));
    barriers.tick(waiting->fences);
    for (auto& fiber : fibers) fiber.state = State::ready;
  }
}

// ---- accesses ----

Who me() { return {Level::thread, threadgroup_now << 10 | uint32_t(self())}; }

enum class Order { none, unfenced, ordered };
Order order_after(const Access& then, const Region& region) {
  if (!then.who.within(Level::threadgroup, threadgroup_now)) return Order::none;
  if (barriers.now > then.barriers)
    return barriers.fenced_since(then.barriers, region.space) ? Order::ordered : Order::unfenced;
  const Clock& clock = simdgroups[self() / 32].clock;
  if (then.who.within(Level::simdgroup, me().at(Level::simdgroup)) &&
      clock.now > then.simd_barriers)
    return clock.fenced_since(then.simd_barriers, region.space) ? Order::ordered : Order::unfenced;
  return Order::none;
}

void check_order(const Access& then, const Region& region, const char* name, size_t byte,
                 const char* kind) {
  if (then.who.level == Level::none || then.who.within(Level::thread, me().id)) return;
  const Order order = order_after(then, region);
  if (order == Order::ordered) return;
  find(text("%s: %s on %s", order == Order::none ? "race" : "fence missing", kind, name),
       text("byte %zu, %s", byte, here().c_str()));
}

void note_read(Access& reads, const Access& mine) {
  const bool same_threadgroup = reads.who.within(Level::threadgroup, threadgroup_now);
  // Reads that a barrier has ordered before this one need not be kept.
  const bool older =
      reads.who.level == Level::none ||
      (same_threadgroup && reads.barriers != mine.barriers) ||
      (reads.who.within(Level::simdgroup, mine.who.at(Level::simdgroup)) &&
       reads.simd_barriers != mine.simd_barriers);
  Access merged = mine;
  if (!older)
    for (Level level : {Level::thread, Level::simdgroup, Level::threadgroup, Level::grid}) {
      merged.who = {level, mine.who.at(level)};
      if (reads.who.within(level, merged.who.id)) break;
    }
  reads = merged;
}

void check_cells(Region& region, size_t offset, size_t bytes, bool write, const char* name,
                 size_t byte) {
  const Access mine{me(), barriers.now, simdgroups[self() / 32].clock.now};
  for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; i++) {
    Cell& cell = region.cells[i];
    if (!write && !cell.set)
      find(text("uninitialised read of %s", name), text("byte %zu, %s", byte, here().c_str()));
    check_order(cell.write, region, name, byte, write ? "two writes" : "read after write");
    if (write) {
      check_order(cell.read, region, name, byte, "write after read");
      cell = {mine, {}, true};
    } else {
      note_read(cell.read, mine);
    }
  }
}

void access(void* pointer, size_t bytes, bool write) {
  if (!running || !options.check) return;
  auto* at = static_cast<unsigned char*>(pointer);
  const unsigned char* stack = stacks + self() * kStack;
  if (at >= stack && at < stack + kStack) {
    if (at < stack + kPage) fail("the kernel's private memory overflows its 60 KiB");
    return;
  }
  const char* verb = write ? "write" : "read";
  if (at >= arena_bytes && at < arena_bytes + kArena) {
    const size_t offset = at - arena_bytes;
    for (const Shared& array : shared) {
      if (offset < array.offset - kGap / 2 || offset >= array.offset + array.bytes + kGap / 2)
        continue;
      const int64_t byte = int64_t(offset) - int64_t(array.offset);
      if (byte < 0 || byte + bytes > array.bytes)
        fail(text("out of bounds: %s of threadgroup array %s at byte %ld of %zu, %s", verb,
                  array.name, long(byte), array.bytes, here().c_str()));
      return check_cells(arena, offset, bytes, write, array.name, byte);
    }
    fail(text("out of bounds: %s far from any threadgroup array, %s", verb, here().c_str()));
  }
  for (Region& region : buffers) {
    const int64_t offset = at - region.begin;
    if (offset < -kRedZone || offset >= int64_t(region.bytes) + kRedZone) continue;
    if (offset < 0 || offset + bytes > region.bytes)
      fail(text("out of bounds: %s of %s at element %ld of %zu, %s", verb, region.name,
                long(offset / region.element), region.bytes / region.element, here().c_str()));
    if (write && !region.writable)
      fail(text("write to the input %s, %s", region.name, here().c_str()));
    if (!write) region.bytes_read += bytes;
    if (region.writable) check_cells(region, offset, bytes, write, region.name, offset);
    return;
  }
  fail(text("out of bounds: %s far from any buffer, %s", verb, here().c_str()));
}

Position position_of(const uint3& grid, const uint3& size, const uint3& groups, const uint3& group,
                     const uint3& here_size, uint i) {
  Position p{};
  p.thread_position_in_threadgroup = {i % here_size.x, i / here_size.x % here_size.y,
                                      i / here_size.x / here_size.y};
  p.threadgroup_position_in_grid = group;
  const uint3& in = p.thread_position_in_threadgroup;
  p.thread_position_in_grid = {group.x * size.x + in.x, group.y * size.y + in.y,
                               group.z * size.z + in.z};
  p.threads_per_grid = grid;
  p.threadgroups_per_grid = groups;
  p.threads_per_threadgroup = here_size;
  p.thread_index_in_threadgroup = i;
  p.thread_index_in_simdgroup = i % 32;
  p.simdgroup_index_in_threadgroup = i / 32;
  p.simdgroups_per_threadgroup = (here_size.x * here_size.y * here_size.z + 31) / 32;
  p.threads_per_simdgroup = 32;
  return p;
}

void run_grid(const uint3& grid, const uint3& asked) {
  const uint3 size{std::min(asked.x, grid.x), std::min(asked.y, grid.y), std::min(asked.z, grid.z)};
  const uint3 groups{(grid.x + size.x - 1) / size.x, (grid.y + size.y - 1) / size.y,
                     (grid.z + size.z - 1) / size.z};
  const size_t most = size_t(size.x) * size.y * size.z;
  if (most > 1024) fail(text("a threadgroup of %zu threads; the most is 1024", most));
  if (stack_count < most) {
    if (stacks) munmap(stacks, stack_count * kStack);
    stacks = static_cast<unsigned char*>(mmap(nullptr, most * kStack, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    stack_count = most;
  }
  fibers.clear();
  fibers.resize(most);
  for (int i : in_order(groups.x * groups.y * groups.z)) {
    threadgroup_now = i;
    const uint3 group{uint(i) % groups.x, uint(i) / groups.x % groups.y,
                      uint(i) / groups.x / groups.y};
    // Metal makes the last threadgroups of a grid smaller.
    const uint3 here_size{std::min(size.x, grid.x - group.x * size.x),
                          std::min(size.y, grid.y - group.y * size.y),
                          std::min(size.z, grid.z - group.z * size.z)};
    const size_t count = size_t(here_size.x) * here_size.y * here_size.z;
    if (count != fibers.size()) {
      fibers.clear();
      fibers.resize(count);
    }
    for (size_t t = 0; t < count; t++)
      fibers[t].position = position_of(grid, size, groups, group, here_size, t);
    run_threadgroup();
  }
}

}  // namespace

extern "C" {

const unsigned char* emulator_exchange(const void* value, size_t bytes, int line, uint32_t* lanes) {
  memcpy(running->value, value, bytes);
  wait(State::simd, line);
  const Simdgroup& own = simdgroups[self() / 32];
  *lanes = own.lanes;
  return own.values;
}

void emulator_barrier(bool whole_threadgroup, int fences, int line) {
  running->fences = fences;
  wait(whole_threadgroup ? State::barrier : State::simd_barrier, line);
}

void* emulator_shared(int slot, size_t bytes, const char* name) {
  if (slot >= int(kMostArrays)) fail(text("more than %zu threadgroup arrays", kMostArrays));
  if (int(shared.size()) <= slot) shared.resize(slot + 1);
  Shared& array = shared[slot];
  if (!array.bytes) {
    size_t total = bytes, end = 0;
    for (const Shared& other : shared) {
      total += other.bytes;
      end = std::max(end, other.offset + other.bytes);
    }
    if (total > kSharedLimit)
      fail(text("%zu bytes of threadgroup memory; the most is %zu", total, kSharedLimit));
    array = {(end + kGap + 15) / 16 * 16, bytes, name};
  }
  return arena_bytes + array.offset;
}

Position emulator_position() { return running->position; }

struct Buffer {
  void* begin;
  uint64_t bytes;
  const char* name;
  int32_t writable, element;
};

// Runs the kernel. What was found is written to `report`, a line each, and to `reads` how many
// elements of each buffer were read; 1 if it could not go on.
int emulator_launch(Kernel entry, void** arguments, const Buffer* given, int count,
                    const uint3* grid, const uint3* threadgroup_size, const Options* with,
                    char* report, size_t room, uint64_t* reads) {
  kernel_entry = entry;
  kernel_arguments = arguments;
  options = *with;
  random_state = options.seed * 2654435761u + 88172645u;
  failure.clear();
  findings.clear();
  shared.clear();
  buffers.clear();
  arena = {arena_bytes, kArena, "threadgroup memory", true, kThreadgroup, 4, {}, 0};
  for (int i = 0; i < count; i++) {
    const Buffer& b = given[i];
    const size_t cells = b.writable && options.check ? (b.bytes + 1) / 2 : 0;
    buffers.push_back({static_cast<unsigned char*>(b.begin), b.bytes, b.name, b.writable != 0,
                       kDevice, b.element, std::vector<Cell>(cells), 0});
  }
  try {
    run_grid(*grid, *threadgroup_size);
  } catch (const Stop&) {
    snprintf(report, room, "%s", failure.c_str());
    return 1;
  }
  for (const Region& region : buffers) {
    size_t missing = 0, first = 0;
    for (size_t i = region.cells.size(); i-- > 0;)
      if (!region.cells[i].set) missing++, first = i * 2 / region.element;
    if (missing)
      find(text("output %s is not written in full", region.name),
           text("from element %zu", first));
  }
  for (int i = 0; i < count; i++) reads[i] = buffers[i].bytes_read / buffers[i].element;
  std::string all;
  for (const auto& [what, where] : findings) all += what + " (" + where + ")\n";
  snprintf(report, room, "%s", all.c_str());
  return 0;
}

// What -fsanitize=thread calls.
#define ACCESS(bytes)                                                            \
  void __tsan_read##bytes(void* p) { access(p, bytes, false); }                  \
  void __tsan_write##bytes(void* p) { access(p, bytes, true); }                  \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false); }        \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
