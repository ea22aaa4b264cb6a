// Calls the compiled function from Python with tensors that torch describes on the stack, by its DLPack exchange API.
// TVM-FFI's function, to which every other call goes, makes an object of each tensor and frees it again: 1.0 us a call
// of ten tensors rather than 0.35, the launch aside (AMD EPYC, torch 2.13, TVM-FFI 0.1.15, 2026-11-21).
// Linked into a function's library with -DFUNCTION=__tvm_ffi_<name> -DNAME="<name>".
#include <stdint.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#define MAX_ARGUMENTS 32

// CPython's stable ABI, as the process has it. Python.h need not be installed, and one library serves every version.
// Objects that are variables there come from Python instead, see `kept`.
#define METH_FASTCALL 0x80

typedef struct object { intptr_t references; struct object *type; } PyObject;
typedef PyObject *fast_function(PyObject *self, PyObject *const *arguments, intptr_t count);

struct method {  // PyMethodDef
  const char *name;
  fast_function *function;
  int flags;
  const char *doc;
};

void Py_IncRef(PyObject *);
void Py_DecRef(PyObject *);
PyObject *PyCFunction_NewEx(struct method *, PyObject *self, PyObject *module);
void *PyCapsule_GetPointer(PyObject *, const char *name);
void PyErr_Clear(void);
void PyEval_RestoreThread(void *);
void *PyEval_SaveThread(void);
double PyFloat_AsDouble(PyObject *);
long long PyLong_AsLongLongAndOverflow(PyObject *, int *overflow);
PyObject *PyObject_CallObject(PyObject *, PyObject *arguments);
PyObject *PyTuple_GetItem(PyObject *, intptr_t);
PyObject *PyTuple_New(intptr_t);
int PyTuple_SetItem(PyObject *, intptr_t, PyObject *stolen);

int FUNCTION(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);

// What a callable keeps alive, a tuple in this order; see `load.py`.
enum kept { ORDINARY, RAISE, NONE, NONE_TYPE, FLOAT_TYPE, INT_TYPE, TENSOR_TYPE, PARAMETER_TYPE, NUM_KEPT };

static PyObject *objects[NUM_KEPT];  // those of `kept` that are the same in every callable
static const DLPackExchangeAPI *api;

// A TVM-FFI function that raises as a Python exception the error that compiled code has left.
int __tvm_ffi_cute_kernels_raise(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  (void)self, (void)arguments, (void)count, (void)result;
  return -1;
}

// Whether `argument` could be described. Subclasses of torch's two types may convert in another way: they cannot.
static int describe(PyObject *argument, TVMFFIAny *described, DLTensor *tensor) {
  int overflow = 0;
  described->zero_padding = 0;
  if (argument->type == objects[TENSOR_TYPE] || argument->type == objects[PARAMETER_TYPE]) {
    described->type_index = kTVMFFIDLTensorPtr;
    described->v_ptr = tensor;
    return api->dltensor_from_py_object_no_sync(argument, tensor) == 0;
  }
  if (argument == objects[NONE]) {
    described->type_index = kTVMFFINone;
    described->v_int64 = 0;
  } else if (argument->type == objects[FLOAT_TYPE]) {
    described->type_index = kTVMFFIFloat;
    described->v_float64 = PyFloat_AsDouble(argument);
  } else if (argument->type == objects[INT_TYPE]) {
    described->type_index = kTVMFFIInt;
    described->v_int64 = PyLong_AsLongLongAndOverflow(argument, &overflow);
  } else {
    return 0;
  }
  return !overflow;
}

// The device of the first tensor that is not on the CPU; NULL where there is none.
static const DLDevice *device_of(const TVMFFIAny *described, const DLTensor *tensors, intptr_t count) {
  for (intptr_t i = 0; i < count; ++i)
    if (described[i].type_index == kTVMFFIDLTensorPtr && tensors[i].device.device_type != kDLCPU)
      return &tensors[i].device;
  return NULL;
}

static PyObject *call_ordinary(PyObject *kept, PyObject *const *arguments, intptr_t count) {
  PyErr_Clear();  // what could not be described is for the ordinary function to report
  PyObject *tuple = PyTuple_New(count);
  if (tuple == NULL) return NULL;
  for (intptr_t i = 0; i < count; ++i) {
    Py_IncRef(arguments[i]);
    PyTuple_SetItem(tuple, i, arguments[i]);
  }
  PyObject *result = PyObject_CallObject(PyTuple_GetItem(kept, ORDINARY), tuple);
  Py_DecRef(tuple);
  return result;
}

static PyObject *call(PyObject *kept, PyObject *const *arguments, intptr_t count) {
  TVMFFIAny described[MAX_ARGUMENTS], result = {.type_index = kTVMFFINone};
  DLTensor tensors[MAX_ARGUMENTS];
  if (count > MAX_ARGUMENTS) return call_ordinary(kept, arguments, count);
  for (intptr_t i = 0; i < count; ++i)
    if (!describe(arguments[i], &described[i], &tensors[i])) return call_ordinary(kept, arguments, count);
  const DLDevice *device = device_of(described, tensors, count);
  void *stream, *previous;
  if (device != NULL && (api->current_work_stream(device->device_type, device->device_id, &stream) ||
                         TVMFFIEnvSetStream(device->device_type, device->device_id, stream, &previous)))
    return call_ordinary(kept, arguments, count);
  void *thread = PyEval_SaveThread();  // a launch waits while the device's queue is full, maybe for another thread
  int status = FUNCTION(NULL, described, (int32_t)count, &result);
  PyEval_RestoreThread(thread);
  if (device != NULL && previous != stream)
    status |= TVMFFIEnvSetStream(device->device_type, device->device_id, previous, NULL);
  // Not by calling the ordinary function: what was launched before the error must not be launched again.
  if (status != 0) return PyObject_CallObject(PyTuple_GetItem(kept, RAISE), NULL);
  Py_IncRef(objects[NONE]);
  return objects[NONE];
}

// The callable: the ordinary function where the interpreter or torch is not as this file expects.
PyObject *cute_kernels_bind(PyObject *kept, PyObject *capsule) {
  static struct method method = {NAME, call, METH_FASTCALL, NULL};
  const DLPackExchangeAPI *given = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  int known = given != NULL && given->header.version.major == DLPACK_MAJOR_VERSION &&
              given->dltensor_from_py_object_no_sync != NULL && given->current_work_stream != NULL &&
              PyTuple_GetItem(kept, NONE)->type == PyTuple_GetItem(kept, NONE_TYPE);
  PyErr_Clear();
  if (!known) {
    Py_IncRef(PyTuple_GetItem(kept, ORDINARY));
    return PyTuple_GetItem(kept, ORDINARY);
  }
  for (int i = NONE; i < NUM_KEPT; ++i) objects[i] = PyTuple_GetItem(kept, i);
  api = given;
  return PyCFunction_NewEx(&method, kept, NULL);
}
