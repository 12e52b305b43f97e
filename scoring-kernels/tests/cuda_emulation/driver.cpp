// The functions of the CUDA driver that the backend calls, over the emulated processor: a libcuda.so.1 for machines without
// a GPU. It runs the kernels that are compiled into it, whatever image is loaded, but checks that the image is one.
#include "primitives.h"
#include <mutex>
#include <string>

#include "kernels.cu"

#define EXPORT extern "C" __attribute__((visibility("default"))) int

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, UNAVAILABLE = 46, NO_DEVICE = 100, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
// What to do wrong, for tests of how that is noticed.
enum Fault { NONE, FAULT_NO_DEVICE, FAULT_OLD_DEVICE, FAULT_MEMORY, FAULT_LAUNCH, FAULT_WRONG_SUM, FAULT_BAD_IMAGE,
             FAULT_UNAVAILABLE };

static std::recursive_mutex lock;
static std::map<uintptr_t, size_t> memory;
static size_t used = 0, peak = 0;
static int fault = NONE, pushed = 0, created = 0;
constexpr size_t MEMORY = size_t(2) << 30;
using Guard = std::lock_guard<std::recursive_mutex>;

EXPORT emulate_fault(int which) {
    fault = which;
    return SUCCESS;
}

// Bytes taken now and at most, contexts that were pushed and not popped, and those that were created and not destroyed.
EXPORT emulated_use(size_t* now, size_t* most, int* current, int* alive) {
    Guard guard(lock);
    *now = used, *most = peak, *current = pushed, *alive = created;
    peak = used;
    return SUCCESS;
}

EXPORT cuInit(u32) { return fault == FAULT_NO_DEVICE ? NO_DEVICE : SUCCESS; }
EXPORT cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
EXPORT cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
EXPORT cuDeviceGetName(char* name, int bytes, int) { return std::snprintf(name, bytes, "emulated"), SUCCESS; }
EXPORT cuDeviceGetAttribute(int* value, int attribute, int) {
    const std::map<int, int> known{{75, fault == FAULT_OLD_DEVICE ? 7 : 8}, {76, 0}, {97, STAGES > 2 ? 166912 : 101376}};
    auto found = known.find(attribute);
    if (found == known.end()) return INVALID_VALUE;
    return *value = found->second, SUCCESS;
}
EXPORT cuCtxPushCurrent_v2(void* context) {
    Guard guard(lock);
    if (context != &used || created == 0) return INVALID_CONTEXT;
    return pushed += 1, SUCCESS;
}
EXPORT cuCtxPopCurrent_v2(void** context) {
    Guard guard(lock);
    if (pushed == 0) return INVALID_CONTEXT;
    return pushed -= 1, *context = &used, SUCCESS;
}
// Makes the context current, as the driver does.
EXPORT cuCtxCreate_v2(void** context, u32, int) {
    Guard guard(lock);
    if (fault == FAULT_UNAVAILABLE) return UNAVAILABLE;
    return created += 1, pushed += 1, *context = &used, SUCCESS;
}
EXPORT cuCtxDestroy_v2(void* context) {
    Guard guard(lock);
    if (context != &used || created == 0) return INVALID_CONTEXT;
    return created -= 1, SUCCESS;
}
EXPORT cuMemGetInfo_v2(size_t* left, size_t* total) {
    Guard guard(lock);
    return *left = MEMORY - used, *total = MEMORY, SUCCESS;
}
EXPORT cuModuleLoadData(void** module, const void* image) {
    bool known = std::memcmp(image, "\177ELF", 4) == 0 ||
                 std::strstr(static_cast<const char*>(image), ".version") != nullptr;
    if (fault == FAULT_BAD_IMAGE || !known) return INVALID_IMAGE;
    return *module = &memory, SUCCESS;
}
EXPORT cuModuleGetFunction(void** function, void*, const char* name) {
    for (const char* known : {"softplus_sums", "exponential_sums", "largest_logits", "added", "split"}) {
        if (std::string(name) == known) return *function = const_cast<char*>(known), SUCCESS;
    }
    return NOT_FOUND;
}
EXPORT cuFuncSetAttribute(void*, int, int bytes) {
    return static_cast<size_t>(bytes) <= SHARED_BYTES ? SUCCESS : INVALID_VALUE;
}
EXPORT cuStreamCreate(void** stream, u32) { return *stream = &memory, SUCCESS; }
EXPORT cuStreamDestroy_v2(void*) { return SUCCESS; }
EXPORT cuStreamSynchronize(void*) { return SUCCESS; }

EXPORT cuMemAlloc_v2(u64* address, size_t bytes) {
    Guard guard(lock);
    if (fault == FAULT_MEMORY || bytes == 0 || used + bytes > MEMORY) return OUT_OF_MEMORY;
    void* block = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (block == nullptr) return OUT_OF_MEMORY;
    std::memset(block, 0xff, bytes);
    *address = reinterpret_cast<uintptr_t>(block);
    memory[*address] = bytes;
    used += bytes, peak = std::max(peak, used);
    return SUCCESS;
}
EXPORT cuMemFree_v2(u64 address) {
    Guard guard(lock);
    auto found = memory.find(address);
    if (found == memory.end()) fail("freed what was not allocated");
    used -= found->second;
    std::free(reinterpret_cast<void*>(address));
    memory.erase(found);
    return SUCCESS;
}

// Whether a range lies in one allocation.
static bool inside(u64 address, size_t bytes) {
    auto after = memory.upper_bound(address);
    return after != memory.begin() && address + bytes <= std::prev(after)->first + std::prev(after)->second;
}

EXPORT cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void*) {
    Guard guard(lock);
    if (!inside(to, bytes)) fail("a copy to outside device memory");
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), SUCCESS;
}
EXPORT cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void*) {
    Guard guard(lock);
    if (!inside(from, bytes)) fail("a copy from outside device memory");
    return std::memcpy(to, reinterpret_cast<void*>(from), bytes), SUCCESS;
}
EXPORT cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, void*) {
    Guard guard(lock);
    if (!inside(to, bytes)) fail("memory set outside device memory");
    return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS;
}

struct Copy2D {
    size_t from_x, from_y;
    int from_type;
    const void* from_host;
    u64 from_device;
    void* from_array;
    size_t from_pitch, to_x, to_y;
    int to_type;
    void* to_host;
    u64 to_device;
    void* to_array;
    size_t to_pitch, width, height;
};
EXPORT cuMemcpy2DAsync_v2(const Copy2D* copy, void*) {
    Guard guard(lock);
    if (copy->from_type != 1 || copy->to_type != 2) return INVALID_VALUE;
    for (size_t row = 0; row < copy->height; ++row) {
        u64 to = copy->to_device + row * copy->to_pitch;
        if (!inside(to, copy->width)) fail("a copy to outside device memory");
        const char* from = static_cast<const char*>(copy->from_host) + row * copy->from_pitch;
        std::memcpy(reinterpret_cast<void*>(to), from, copy->width);
    }
    return SUCCESS;
}

EXPORT cuGetErrorName(int code, const char** name) {
    const std::map<int, const char*> names{
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},         {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE"}, {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},         {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    };
    auto found = names.find(code);
    return found == names.end() ? INVALID_VALUE : (*name = found->second, SUCCESS);
}

static std::function<void()> kernel(const std::string& name, void** arguments) {
    auto at = [=](int k) { return arguments[k]; };
    if (name == "split") {
        return [=] {
            split(*static_cast<const float**>(at(0)), *static_cast<f16**>(at(1)), *static_cast<u64*>(at(2)),
                  *static_cast<u32*>(at(3)), *static_cast<u32*>(at(4)), *static_cast<u32*>(at(5)));
        };
    }
    const Job& job = *static_cast<const Job*>(at(0));
    if (name == "added") return [=, &job] { added(job, *static_cast<u32*>(at(1)), *static_cast<double**>(at(2))); };
    if (name == "softplus_sums") return [&job] { softplus_sums(job); };
    if (name == "largest_logits") return [&job] { largest_logits(job); };
    return [&job] { exponential_sums(job); };
}

EXPORT cuLaunchKernel(void* function, u32 x, u32 y, u32 z, u32 threads, u32 threads_y, u32 threads_z, u32 shared, void*,
                      void** arguments, void**) {
    Guard guard(lock);
    if (fault == FAULT_LAUNCH) return ILLEGAL_ADDRESS;
    if (x == 0 || y == 0 || z != 1 || threads != THREADS || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
    std::string name = static_cast<const char*>(function);
    size_t needed = name != "added" && name != "split"
                        ? STAGES * SLAB_BYTES * 2 + WARPS_ACROSS * TILE * (sizeof(double) + sizeof(float)) : 0;
    if (shared < needed) fail("the block was given less shared memory than it uses");
    processor.memory = &memory;
    for (u32 k = 0; k < x * y; ++k) run_block({k % x, k / x, 0}, threads, kernel(name, arguments));
    if (fault == FAULT_WRONG_SUM && name == "added") {
        (*static_cast<double**>(arguments[2]))[0] += 0.01;
    }
    return SUCCESS;
}
