// What the host code of a compiled CuTe DSL function calls of its runtime library and of CUDA. Linked into each
// function's library, so that its state belongs to that function. A launch goes to a callback, with the kernel's name.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kNotSupported = 801;

constexpr int kAttributeMaxThreads = 1;
constexpr int kAttributeWarpSize = 10;
constexpr int kAttributeNumSms = 16;
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kAttributeSharedOptin = 97;

constexpr int kMaxLibraries = 64;

}  // namespace

extern "C" {

// cudaLaunchConfig_t and cudaLaunchAttribute of CUDA 12 and 13.
struct LaunchAttribute {
  uint32_t id;
  uint32_t pad;
  uint32_t value[16];
};
struct LaunchConfig {
  uint32_t grid[3];
  uint32_t block[3];
  uint64_t dynamic_shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  uint32_t num_attributes;
};

using LaunchCallback = int (*)(const char* kernel, const LaunchConfig* config, void** args);

struct HostDevice {
  LaunchCallback launch;
  int32_t major, minor;
  int32_t num_sms;
  int32_t max_shared_bytes;
};

static HostDevice device;

void ptxe_host_device(const HostDevice* chosen) { device = *chosen; }

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);

int _cudaGetDevice(int* out) {
  *out = 0;
  return kSuccess;
}
int _cudaSetDevice(int) { return kSuccess; }

int _cudaDeviceGetAttribute(int* out, int attribute, int) {
  switch (attribute) {
    case kAttributeMaxThreads: *out = 1024; return kSuccess;
    case kAttributeWarpSize: *out = 32; return kSuccess;
    case kAttributeNumSms: *out = device.num_sms; return kSuccess;
    case kAttributeMajor: *out = device.major; return kSuccess;
    case kAttributeMinor: *out = device.minor; return kSuccess;
    case kAttributeSharedOptin: *out = device.max_shared_bytes; return kSuccess;
    default: return kNotSupported;
  }
}

int _cudaLibraryLoadData(void** library, const void*, void*, void*, unsigned, void*, void*, unsigned) {
  static char loaded;
  *library = &loaded;
  return kSuccess;
}

// A kernel's handle is its name.
int _cudaLibraryGetKernel(void** kernel, void*, const char* name) {
  static std::set<std::string> names;
  *kernel = const_cast<char*>(names.insert(name).first->c_str());
  return kSuccess;
}

int _cuKernelGetAttribute(int* out, int, void*, int) {
  *out = 0;  // static shared memory, which the machine checks itself
  return kSuccess;
}
int _cudaFuncSetAttribute(const void*, int, int) { return kSuccess; }
int _cudaKernelSetAttributeForDevice(void*, int, int, int) { return kSuccess; }

int _cudaLaunchKernelEx(const LaunchConfig* config, const void* kernel, void** args) {
  if (device.launch == nullptr) return kInvalidValue;
  return device.launch(static_cast<const char*>(kernel), config, args);
}

int cuda_dialect_init_library_once(uint64_t* state, int (*init)(void**), int (*load_to_device)(void**, int), void*) {
  static void* libraries[kMaxLibraries];
  if (*state != 0) return kSuccess;
  int code = init(libraries);
  if (code == kSuccess) code = load_to_device(libraries, 0);
  if (code == kSuccess) *state = 1;
  if (code != kSuccess) TVMFFIErrorSetRaisedFromCStr("RuntimeError", "the emulator's host could not load the kernels");
  return code;
}
void cuda_dialect_unload_library_once(uint64_t*) {}
const char* cuda_dialect_get_error_name(int) { return "an error of the emulated CUDA runtime"; }

void CuteDSLRT_TVMFFISetRaisedCudaError(void*, int code) {
  char text[96];
  std::snprintf(text, sizeof text, "the emulated CUDA runtime returned error %d", code);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
}

}  // extern "C"
