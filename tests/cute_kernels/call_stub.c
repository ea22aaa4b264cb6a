// For `test_call.py`: a CUDA runtime that writes down launches, and torch's exchange API with CPU tensors as CUDA ones.
#include <dlpack/dlpack.h>
#include <string.h>
#include <unistd.h>

#define MAX_PARAMETERS 16

size_t num_parameters, sizes[MAX_PARAMETERS];  // of the kernel
char parameters[1024];                         // of the last launch, one after the other
void *launched_on;
int num_launches, launch_status, is_waiting, must_wait;

struct config {  // cudaLaunchConfig_t
  unsigned grid[3], block[3];
  size_t smem_bytes;
  void *stream;
};

int _cudaLaunchKernelEx(const struct config *config, void *kernel, void **pointers) {
  (void)kernel;
  ++num_launches;
  launched_on = config->stream;
  char *end = parameters;
  for (size_t i = 0; i < num_parameters; end += sizes[i++]) memcpy(end, pointers[i], sizes[i]);
  __atomic_store_n(&is_waiting, 1, __ATOMIC_SEQ_CST);
  for (int i = 0; __atomic_load_n(&must_wait, __ATOMIC_SEQ_CST); ++i) {
    if (i > 10000) return 999;
    usleep(1000);
  }
  return launch_status;
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);

void CuteDSLRT_TVMFFISetRaisedCudaError(void *unused, int code) {
  (void)unused;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", code == 999 ? "waited too long" : "a failing launch");
}

int cuda_dialect_init_library_once(size_t *state, int (*init)(void **), int (*load)(void **, int), void *unused) {
  static void *libraries[16];
  (void)unused;
  if (*state == 0) *state = init(libraries) == 0 && load(libraries, 0) == 0;
  return *state == 0;
}

static int nothing;  // what libraries and kernels are here
int _cudaLibraryLoadData(void **library) { return *library = &nothing, 0; }
int _cudaLibraryGetKernel(void **kernel) { return *kernel = &nothing, 0; }
int _cudaGetDevice(int *device) { return *device = 0, 0; }
int _cudaSetDevice(int device) { return (void)device, 0; }
int _cudaDeviceGetAttribute(int *value) { return *value = 1 << 20, 0; }
int _cuKernelGetAttribute(int *value) { return *value = 0, 0; }
int _cudaFuncSetAttribute(void) { return 0; }
int _cudaKernelSetAttributeForDevice(void) { return 0; }
void cuda_dialect_unload_library_once(void) {}

static DLPackExchangeAPI theirs, *changed;
void *data_on_cpu, *data_on_second_device, *current_stream;
int must_refuse, stream_status, num_managed, num_stream_queries;

void *PyErr_NoMemory(void);

static void place(DLTensor *tensor) {
  if (tensor->data == data_on_cpu) return;
  tensor->device.device_type = kDLCUDA;
  tensor->device.device_id = tensor->data == data_on_second_device;
}

static int describe(void *object, DLTensor *tensor) {
  if (must_refuse) return PyErr_NoMemory() == NULL;
  int status = theirs.dltensor_from_py_object_no_sync(object, tensor);
  if (status == 0) place(tensor);
  return status;
}

static int manage(void *object, DLManagedTensorVersioned **managed) {
  ++num_managed;
  int status = theirs.managed_tensor_from_py_object_no_sync(object, managed);
  if (status == 0) place(&(*managed)->dl_tensor);
  return status;
}

static int find_stream(DLDeviceType type, int32_t device, void **stream) {
  ++num_stream_queries;
  *stream = (char *)current_stream + device;
  return type != kDLCUDA || stream_status;
}

// TVM-FFI and the functions under test keep a pointer to the API, which is why it is changed in place.
void change_api(DLPackExchangeAPI *api) {
  theirs = *api;
  changed = api;
  api->dltensor_from_py_object_no_sync = describe;
  api->managed_tensor_from_py_object_no_sync = manage;
  api->current_work_stream = find_stream;
}
void restore_api(void) { *changed = theirs; }
