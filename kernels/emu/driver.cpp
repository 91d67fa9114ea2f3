// libcuda.so.1 over the emulator: the functions of the CUDA driver API that azr calls, so that its
// unmodified binary runs its GPU path on a machine without a GPU. Tests only.
//
// Streams run their work on the calling thread: at once or, with DEFER, as late as a real one may:
// when somebody waits for it. While a stream is being captured its work becomes a graph's, and what
// a graph cannot hold (waiting, memory, pageable copies) fails and spoils the capture. Options come
// from AZR_EMU_* variables or, for the calling thread, from azr_emu_set (emu/src/lib.rs):
//   CC (90) compute capability, SMS (3), MEMORY (bytes), DRIVER (12080), NO_DEVICE,
//   ORDER, LANDING, SEED, RACE, ARITHMETIC, WORKERS (runtime.h: Options),
//   DEFER: streams put their work off;
//   SKIP: no kernel runs and memory is plain and zero, so that only the host's own work takes time.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"
#include "tensor_map.h"

using namespace emu;

#define API extern "C" __attribute__((visibility("default"))) int

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_HANDLE = 400,
  ILLEGAL_STATE = 401,
  NOT_FOUND = 500,
  NOT_READY = 600,
  LAUNCH_FAILED = 719,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
};

typedef std::function<int()> Job;

struct Graph {
  std::vector<Job> jobs;
};
struct Stream {
  std::unique_ptr<Graph> capture;
  bool spoilt = false;      // The capture.
  std::deque<Job> waiting;  // Work that is put off.
};
struct Event {
  std::chrono::steady_clock::time_point time;
  Stream* stream = nullptr;
  u64 recorded = 0, reached = 0;
};
struct Module {
  std::string image;
  std::vector<std::unique_ptr<struct Function>> functions;
};
struct Function {
  const Kernel* kernel;
  u32 smem_limit = 48 << 10;
};

// ---- Kernels that are compiled in

static std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

void emu::register_kernel(const Kernel& kernel) { kernels().push_back(kernel); }

static const Kernel* find_kernel(const std::string& name) {
  for (const Kernel& kernel : kernels()) {
    if (name == kernel.name) return &kernel;
  }
  return nullptr;
}

// ---- Options, and the error of a thread

static u64 variable(const char* name, u64 otherwise) {
  const char* text = getenv((std::string("AZR_EMU_") + name).c_str());
  return text ? strtoull(text, nullptr, 0) : otherwise;
}

struct ThreadState {
  Options options;
  u32 capability, sms;
  Stats stats{};
  int sticky = SUCCESS;
  std::string message, fault, error_text;
  Stream default_stream;

  ThreadState() {
    options.order = variable("ORDER", ASCENDING);
    options.landing = variable("LANDING", LATE);
    options.seed = variable("SEED", 0);
    options.race = variable("RACE", 0);
    options.arithmetic = variable("ARITHMETIC", PLAIN);
    options.workers = variable("WORKERS", 1);
    capability = variable("CC", 90);
    sms = variable("SMS", 3);
  }
};

static ThreadState& state() {
  static thread_local std::unique_ptr<ThreadState> s(new ThreadState);
  return *s;
}

// Sets an option of this thread. Returns 0, or 1 when there is no such option.
API azr_emu_set(const char* name, u32 value) {
  ThreadState& s = state();
  std::string option = name;
  if (option == "order") return s.options.order = value, 0;
  if (option == "landing") return s.options.landing = value, 0;
  if (option == "seed") return s.options.seed = value, 0;
  if (option == "race") return s.options.race = value, 0;
  if (option == "arithmetic") return s.options.arithmetic = value, 0;
  if (option == "workers") return s.options.workers = value, 0;
  if (option == "capability") return s.capability = value, 0;
  if (option == "sms") return s.sms = value, 0;
  return 1;
}

// Plants a fault by name in this thread's launches; null or empty: none.
API azr_emu_plant(const char* fault) {
  state().fault = fault ? fault : "";
  return 0;
}

// Counts of this thread's launches since the last call; forgets its error too.
API azr_emu_take_stats(Stats* stats) {
  ThreadState& s = state();
  *stats = s.stats;
  s.stats = {};
  s.sticky = SUCCESS;
  return 0;
}

static Stream& of(Stream* stream) { return stream ? *stream : state().default_stream; }

static int run(Stream* stream, Job job) {
  Stream& s = of(stream);
  if (s.capture) {
    if (s.spoilt) return CAPTURE_INVALIDATED;
    s.capture->jobs.push_back(std::move(job));
    return SUCCESS;
  }
  if (state().sticky) return state().sticky;
  static const bool defer = variable("DEFER", 0);
  if (!defer) return job();
  s.waiting.push_back(std::move(job));
  return SUCCESS;
}

// Runs what a stream has put off, or as much of it as `enough` asks for.
static int catch_up(Stream* stream, const std::function<bool()>& enough = nullptr) {
  Stream& s = of(stream);
  while (!s.waiting.empty() && !(enough && enough())) {
    Job job = std::move(s.waiting.front());
    s.waiting.pop_front();
    int error = state().sticky ? state().sticky : job();
    if (error) return state().sticky = error;
  }
  return state().sticky;
}

// What a capture does not allow: an error for the call, and for the end of the capture.
static bool spoils(Stream* stream) {
  Stream& s = of(stream);
  if (s.capture) s.spoilt = true;
  return s.spoilt;
}
// The stream that this thread captures, which also forbids calls that name no stream.
static thread_local Stream* capturing;
static bool spoils_any() { return capturing && spoils(capturing); }

// ---- Driver, device, context

API cuInit(u32) { return variable("NO_DEVICE", 0) ? NO_DEVICE : SUCCESS; }
API cuDriverGetVersion(int* version) {
  *version = variable("DRIVER", 12080);
  return SUCCESS;
}
API cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}
API cuDeviceGetName(char* name, int bytes, int) {
  snprintf(name, bytes, "azr emulator");
  return SUCCESS;
}
static u64 total_memory() { return variable("MEMORY", 4ull << 30); }
API cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = total_memory();
  return SUCCESS;
}

static int optin_smem(u32 capability) {
  if (capability == 80 || capability == 87) return 163 << 10;
  if (capability >= 90 && capability < 120) return 227 << 10;
  return 99 << 10;
}

API cuDeviceGetAttribute(int* value, int attribute, int) {
  u32 cc = state().capability;
  switch (attribute) {
    case 1:  // Threads per block.
      *value = 1024;
      break;
    case 8:  // Shared memory per block.
      *value = 48 << 10;
      break;
    case 10:  // Warp.
      *value = 32;
      break;
    case 16:  // Multiprocessors.
      *value = state().sms;
      break;
    case 38:  // L2 cache.
      *value = 50 << 20;
      break;
    case 75:
      *value = cc / 10;
      break;
    case 76:
      *value = cc % 10;
      break;
    case 97:  // Shared memory per block when asked for.
      *value = optin_smem(cc);
      break;
    case 115:  // Memory pools.
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** context, int) {
  *context = (void*)1;
  return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void*) { return SUCCESS; }
API cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return SUCCESS;
}
API cuCtxSynchronize() { return spoils_any() ? (int)CAPTURE_UNSUPPORTED : state().sticky; }

API cuGetErrorName(int error, const char** name) {
  switch (error) {
    case SUCCESS:
      *name = "CUDA_SUCCESS";
      break;
    case INVALID_VALUE:
      *name = "CUDA_ERROR_INVALID_VALUE";
      break;
    case OUT_OF_MEMORY:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      break;
    case NO_DEVICE:
      *name = "CUDA_ERROR_NO_DEVICE";
      break;
    case LAUNCH_FAILED:
      *name = "CUDA_ERROR_LAUNCH_FAILED";
      break;
    default:
      *name = "CUDA_ERROR";
  }
  return SUCCESS;
}
API cuGetErrorString(int error, const char** text) {
  std::string& kept = state().error_text;
  kept = "error " + std::to_string(error);
  if (!state().message.empty()) kept += ": " + state().message;
  *text = kept.c_str();
  return SUCCESS;
}

// ---- Modules

// A cubin, PTX, or "STUB": kernels that are compiled in, whatever the image.
API cuModuleLoadData(Module** module, const char* image) {
  if (spoils_any()) return CAPTURE_UNSUPPORTED;
  bool elf = memcmp(image, "\177ELF", 4) == 0;
  std::string bytes;
  if (elf) {
    u64 sections;
    u16 size, count;
    memcpy(&sections, image + 40, 8);
    memcpy(&size, image + 58, 2);
    memcpy(&count, image + 60, 2);
    bytes.assign(image, sections + (u64)size * count);
  } else if (memcmp(image, "STUB", 4) == 0) {
    bytes = "STUB";
  } else if (image[0] == '/' || image[0] == '.') {
    bytes = image;  // PTX is text that ends with 0.
  } else {
    return INVALID_IMAGE;
  }
  *module = new Module{bytes, {}};
  return SUCCESS;
}
API cuModuleUnload(Module* module) {
  delete module;
  return SUCCESS;
}
API cuModuleGetFunction(Function** function, Module* module, const char* name) {
  const Kernel* kernel = find_kernel(name);
  bool in_image = module->image == "STUB" || module->image.find(name) != std::string::npos;
  if (!kernel || !in_image) {
    state().message = std::string("no kernel ") + name + (kernel ? " in the image" : "");
    return NOT_FOUND;
  }
  module->functions.emplace_back(new Function{kernel});
  *function = module->functions.back().get();
  return SUCCESS;
}
API cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (attribute != 8) return SUCCESS;
  if (value > optin_smem(state().capability)) return INVALID_VALUE;
  function->smem_limit = value;
  return SUCCESS;
}
API cuFuncGetAttribute(int* value, int, Function*) {
  *value = 0;
  return SUCCESS;
}
API cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* bytes) {
  u64 at = 0;
  for (size_t i = 0; function->kernel->param_bytes[i]; i++) {
    u64 size = function->kernel->param_bytes[i];
    u64 align = size >= 64 ? 64 : size;
    at = (at + align - 1) / align * align;
    if (i == index) {
      *offset = at;
      if (bytes) *bytes = size;
      return SUCCESS;
    }
    at += size;
  }
  return INVALID_VALUE;
}

// ---- Streams and events

API cuStreamCreate(Stream** stream, u32) {
  *stream = new Stream;
  return SUCCESS;
}
API cuStreamCreateWithPriority(Stream** stream, u32, int) { return cuStreamCreate(stream, 0); }
API cuStreamDestroy_v2(Stream* stream) {
  catch_up(stream);
  delete stream;
  return SUCCESS;
}
API cuStreamSynchronize(Stream* stream) {
  return spoils(stream) ? (int)CAPTURE_UNSUPPORTED : catch_up(stream);
}
API cuStreamQuery(Stream* stream) {
  if (spoils(stream)) return CAPTURE_UNSUPPORTED;
  return of(stream).waiting.empty() ? state().sticky : (int)NOT_READY;
}
API cuStreamWaitEvent(Stream*, Event*, u32) { return SUCCESS; }
API cuEventCreate(Event** event, u32) {
  *event = new Event;
  return SUCCESS;
}
API cuEventDestroy_v2(Event* event) {
  delete event;
  return SUCCESS;
}
API cuEventRecord(Event* event, Stream* stream) {
  u64 number = ++event->recorded;
  event->stream = stream;
  return run(stream, [=] {
    event->time = std::chrono::steady_clock::now();
    event->reached = number;
    return SUCCESS;
  });
}
API cuEventSynchronize(Event* event) {
  if (event->stream && spoils(event->stream)) return CAPTURE_UNSUPPORTED;
  u64 number = event->recorded;
  return catch_up(event->stream, [=] { return event->reached >= number; });
}
API cuEventQuery(Event* event) {
  return event->reached < event->recorded ? (int)NOT_READY : state().sticky;
}
API cuEventElapsedTime(float* ms, Event* from, Event* to) {
  if (from->reached < from->recorded || to->reached < to->recorded) return NOT_READY;
  *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return SUCCESS;
}

// ---- Memory

static std::mutex memory_mutex;
static u64 memory_used;

static bool skip_kernels() {
  static const bool skip = variable("SKIP", 0);
  return skip;
}

// Plain memory that is used again, as a device's pool does.
struct PlainPool {
  std::unordered_map<u64, u64> bytes_of;
  std::unordered_map<u64, std::vector<u64>> unused;

  u64 take(u64 bytes) {
    std::vector<u64>& known = unused[bytes];
    u64 p = known.empty() ? (u64)calloc(1, bytes) : known.back();
    if (!known.empty()) known.pop_back();
    if (bytes <= 1 << 14) memset((void*)p, 0, bytes);  // Drawn tokens are in the vocabulary.
    bytes_of[p] = bytes;
    return p;
  }
  bool give(u64 p) {
    auto found = bytes_of.find(p);
    if (found == bytes_of.end()) return false;
    unused[found->second].push_back(p);
    bytes_of.erase(found);
    return true;
  }
};
static PlainPool plain_pool;

// What was freed in the order of a stream: the pool keeps it, and uses a piece again for as many
// bytes. As with the real one, pieces are neither joined nor given to others before it is trimmed.
struct Pool {
  std::unordered_map<u64, u64> pieces;  // By their bytes, how many.
  u64 bytes = 0;
};
static Pool pool;

API cuMemAlloc_v2(u64* p, size_t bytes) {
  if (spoils_any()) return CAPTURE_UNSUPPORTED;
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (skip_kernels()) return (*p = plain_pool.take(bytes)) ? SUCCESS : OUT_OF_MEMORY;
  if (bytes == 0) return INVALID_VALUE;
  if (memory_used + pool.bytes + bytes > total_memory()) return OUT_OF_MEMORY;
  *p = device_alloc(bytes);
  if (!*p) return OUT_OF_MEMORY;
  memory_used += bytes;
  return SUCCESS;
}
API cuMemFree_v2(u64 p) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (skip_kernels()) return plain_pool.give(p) ? SUCCESS : INVALID_VALUE;
  const Allocation* allocation = find_allocation(p);
  u64 bytes = allocation && allocation->base == p ? allocation->bytes : 0;
  if (!device_free(p)) return INVALID_VALUE;
  memory_used -= bytes;
  return SUCCESS;
}
API cuDeviceGetDefaultMemPool(void** p, int) {
  *p = &pool;
  return SUCCESS;
}
// 4: the bytes that the pool keeps, as 64 bits.
API cuMemPoolSetAttribute(void* p, int attribute, void* value) {
  return p == &pool && attribute == 4 && *(u64*)value == ~0ull ? SUCCESS : INVALID_VALUE;
}
API cuMemPoolTrimTo(void* p, size_t keep) {
  if (p != &pool || keep != 0) return INVALID_VALUE;
  std::lock_guard<std::mutex> lock(memory_mutex);
  pool = Pool();
  return SUCCESS;
}
API cuMemAllocAsync(u64* p, size_t bytes, Stream*) {
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    u64& pieces = pool.pieces[bytes];
    if (pieces > 0) {
      pieces--;
      pool.bytes -= bytes;
    }
  }
  return cuMemAlloc_v2(p, bytes);
}
API cuMemFreeAsync(u64 p, Stream* stream) {
  if (spoils(stream)) return CAPTURE_UNSUPPORTED;
  return run(stream, [=] {
    u64 bytes;
    {
      std::lock_guard<std::mutex> lock(memory_mutex);
      const Allocation* allocation = find_allocation(p);
      bytes = allocation && allocation->base == p ? allocation->bytes : 0;
    }
    int error = cuMemFree_v2(p);
    if (error == SUCCESS && !skip_kernels()) {
      std::lock_guard<std::mutex> lock(memory_mutex);
      pool.pieces[bytes]++;
      pool.bytes += bytes;
    }
    return error;
  });
}
API cuMemGetInfo_v2(size_t* free, size_t* total) {
  *total = total_memory();
  *free = *total - memory_used - pool.bytes;
  return SUCCESS;
}
// Page-locked memory, by its address.
static std::map<u64, u64> pinned;

static bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto after = pinned.upper_bound((u64)p);
  return after != pinned.begin() && (u64)p < std::prev(after)->first + std::prev(after)->second;
}

API cuMemHostAlloc(void** p, size_t bytes, u32) {
  if (spoils_any()) return CAPTURE_UNSUPPORTED;
  std::lock_guard<std::mutex> lock(memory_mutex);
  *p = aligned_alloc(4096, (bytes + 4095) & ~4095ull);
  if (!*p) return OUT_OF_MEMORY;
  pinned[(u64)*p] = bytes;
  return SUCCESS;
}
API cuMemFreeHost(void* p) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (pinned.erase((u64)p) == 0) return INVALID_VALUE;
  free(p);
  return SUCCESS;
}

// Whether `bytes` from `p` lie in one allocation.
static bool inside(u64 p, u64 bytes) {
  if (skip_kernels()) return true;
  const Allocation* a = find_allocation(p);
  return bytes == 0 || (a && p + bytes <= a->base + a->bytes);
}

// Pageable memory is read at once; page-locked memory when the copy's turn comes.
API cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, Stream* stream) {
  bool late = is_pinned(from);
  if (!late && spoils(stream)) return CAPTURE_UNSUPPORTED;
  auto kept = std::make_shared<std::string>();
  if (!late) kept->assign((const char*)from, bytes);
  return run(stream, [=] {
    if (!inside(to, bytes)) return INVALID_VALUE;
    memcpy((void*)to, late ? from : kept->data(), bytes);
    return SUCCESS;
  });
}
// A copy to pageable memory is waited for.
API cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, Stream* stream) {
  bool late = is_pinned(to);
  if (!late && spoils(stream)) return CAPTURE_UNSUPPORTED;
  int error = run(stream, [=] {
    if (!inside(from, bytes)) return INVALID_VALUE;
    memcpy(to, (void*)from, bytes);
    return SUCCESS;
  });
  return error || late ? error : catch_up(stream);
}
API cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, Stream* stream) {
  return run(stream, [=] {
    if (!inside(from, bytes) || !inside(to, bytes)) return INVALID_VALUE;
    memmove((void*)to, (void*)from, bytes);
    return SUCCESS;
  });
}
API cuMemcpyHtoD_v2(u64 to, const void* from, size_t bytes) {
  return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
}
API cuMemcpyDtoH_v2(void* to, u64 from, size_t bytes) {
  return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}
API cuMemsetD8Async(u64 p, u8 value, size_t bytes, Stream* stream) {
  return run(stream, [=] {
    if (!inside(p, bytes)) return INVALID_VALUE;
    memset((void*)p, value, bytes);
    return SUCCESS;
  });
}
API cuMemsetD32Async(u64 p, u32 value, size_t count, Stream* stream) {
  return run(stream, [=] {
    if (!inside(p, 4 * count) || p % 4) return INVALID_VALUE;
    std::fill_n((u32*)p, count, value);
    return SUCCESS;
  });
}

// ---- Graphs

API cuStreamBeginCapture_v2(Stream* stream, int mode) {
  if (!stream || mode < 0 || mode > 2) return INVALID_VALUE;
  if (stream->capture) return ILLEGAL_STATE;
  stream->capture.reset(new Graph);
  if (mode != 2) capturing = stream;  // 2: relaxed.
  return SUCCESS;
}
API cuStreamEndCapture(Stream* stream, Graph** graph) {
  *graph = nullptr;
  if (!stream->capture) return ILLEGAL_STATE;
  capturing = nullptr;
  std::unique_ptr<Graph> done = std::move(stream->capture);
  bool spoilt = stream->spoilt;
  stream->spoilt = false;
  if (spoilt) return CAPTURE_INVALIDATED;
  *graph = done.release();
  return SUCCESS;
}
API cuStreamIsCapturing(Stream* stream, int* status) {
  *status = stream && stream->capture ? (stream->spoilt ? 2 : 1) : 0;
  return SUCCESS;
}
// Outside the pool.
static const u64 GRAPH_BYTES = 64 << 10;
API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, u64 flags) {
  if (!graph || flags) return INVALID_VALUE;
  if (memory_used + pool.bytes + GRAPH_BYTES > total_memory()) return OUT_OF_MEMORY;
  *executable = new Graph(*graph);
  return SUCCESS;
}
API cuGraphUpload(Graph*, Stream*) { return SUCCESS; }
// The work outlives the graph when that is destroyed before the work is done.
API cuGraphLaunch(Graph* graph, Stream* stream) {
  if (!graph) return INVALID_VALUE;
  if (spoils(stream)) return CAPTURE_UNSUPPORTED;
  if (skip_kernels()) return SUCCESS;
  auto jobs = std::make_shared<std::vector<Job>>(graph->jobs);
  return run(stream, [=] {
    for (Job& job : *jobs) {
      if (int error = job()) return error;
    }
    return (int)SUCCESS;
  });
}
API cuGraphDestroy(Graph* graph) {
  delete graph;
  return SUCCESS;
}
API cuGraphExecDestroy(Graph* graph) {
  delete graph;
  return SUCCESS;
}

// ---- Tensor maps: matrices, no interleaving, no swizzle or that of 128 bytes

API cuTensorMapEncodeTiled(TensorMap* map, int type, u32 rank, void* base, const u64* sizes,
                           const u64* strides, const u32* box, const u32* element_strides,
                           int interleave, int swizzle, int, int fill) {
  static const u32 bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  if (rank != 2 || type < 0 || type > 9 || interleave || fill) return INVALID_VALUE;
  if (element_strides[0] != 1 || element_strides[1] != 1 || (u64)map % 64) return INVALID_VALUE;
  if ((u64)base % 16 || strides[0] % 16 || sizes[0] == 0 || sizes[1] == 0) return INVALID_VALUE;
  u32 row = box[0] * bytes[type];
  if (box[0] > 256 || box[1] > 256 || row % 16 || box[0] == 0 || box[1] == 0) return INVALID_VALUE;
  if ((swizzle != 0 && swizzle != 3) || (swizzle == 3 && row > 128)) return INVALID_VALUE;
  encode_map(map, {BOX_MAGIC, (u8*)base, sizes[0], sizes[1], strides[0], box[0], box[1],
                   bytes[type], swizzle == 3 ? 128u : 0u});
  return SUCCESS;
}

// ---- Launches

// Arguments of a launch, copied.
struct Arguments {
  struct alignas(64) Slot {
    u8 bytes[192];
  };
  std::vector<Slot> slots;

  Arguments(const Kernel& kernel, void** params) {
    for (size_t i = 0; kernel.param_bytes[i]; i++) {
      slots.emplace_back();
      memcpy(slots.back().bytes, params[i], kernel.param_bytes[i]);
    }
  }
};

static int launch(const Function& function, Dim grid, Dim block, Dim cluster, u32 smem,
                  Stream* stream, void** params) {
  ThreadState& s = state();
  u64 threads = (u64)block.x * block.y * block.z, blocks = (u64)grid.x * grid.y * grid.z;
  u32 cluster_blocks = cluster.x * cluster.y * cluster.z;
  s.message.clear();
  if (threads == 0 || blocks == 0) s.message = "an empty grid or block";
  if (threads > function.kernel->max_threads)
    s.message = "more threads than the kernel's launch bound";
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) s.message = "too large a grid";
  if (smem > function.smem_limit)
    s.message = "more dynamic shared memory than the function may have";
  if (cluster_blocks == 0 || cluster_blocks > 8 || grid.x % cluster.x || grid.y % cluster.y ||
      grid.z % cluster.z) {
    s.message = "the grid is not made of whole clusters of at most 8 blocks";
  }
  if (!s.message.empty()) {
    s.message += std::string(", launching ") + function.kernel->name;
    return INVALID_VALUE;
  }
  if (skip_kernels()) return SUCCESS;
  auto arguments = std::make_shared<Arguments>(*function.kernel, params);
  const Kernel* kernel = function.kernel;
  return run(stream, [=] {
    ThreadState& now = state();
    std::vector<void*> pointers;
    for (auto& slot : arguments->slots) pointers.push_back(slot.bytes);
    planted_fault = now.fault.empty() ? nullptr : now.fault.c_str();
    install_fault_handler();
    std::string error =
        run_grid({kernel, grid, block, cluster, smem, pointers.data(), now.options}, &now.stats);
    planted_fault = nullptr;
    if (error.empty()) return (int)SUCCESS;
    now.message = std::string(kernel->name) + ": " + error;
    return now.sticky = LAUNCH_FAILED;
  });
}

API cuLaunchKernel(Function* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 smem,
                   Stream* stream, void** params, void**) {
  return launch(*function, {gx, gy, gz}, {bx, by, bz}, {1, 1, 1}, smem, stream, params);
}

// CUlaunchConfig and CUlaunchAttribute.
struct LaunchAttribute {
  int id;
  u8 padding[4];
  union {
    u8 bytes[64];
    Dim dim;
  };
};
struct LaunchConfig {
  Dim grid, block;
  u32 smem;
  Stream* stream;
  LaunchAttribute* attributes;
  u32 num_attributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "layouts of cuda.h");

API cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** params, void**) {
  Dim cluster = {1, 1, 1};
  for (u32 i = 0; i < config->num_attributes; i++) {
    const LaunchAttribute& attribute = config->attributes[i];
    if (attribute.id == 4) cluster = attribute.dim;  // Cluster dimension.
    if (attribute.id != 4 && attribute.id != 6) return INVALID_VALUE;
  }
  return launch(*function, config->grid, config->block, cluster, config->smem, config->stream,
                params);
}
