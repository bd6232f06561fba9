/* In place of the driver: launches nothing, and keeps the arguments of the last launch, as Triton's launcher has them. */

#include <stdint.h>
#include <string.h>

int count, sizes[1024], launches;
uint64_t values[1024];

int cuLaunchKernelEx(void *config, void *function, void **arguments, void **extra) {
  launches++;
  for (int i = 0; i < count; i++) {
    values[i] = 0;
    memcpy(&values[i], arguments[i], sizes[i]);
  }
  return 0;
}

/* All limits are met, every address is the device's. */
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 1 << 20, 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = 1 << 10, 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t address) { return *value = address, 0; }
int cuModuleLoadData(void **module, void *image) { return *module = &count, 0; }
int cuModuleGetFunction(void **function, void *module, char *name) { return *function = &count, 0; }
int cuCtxGetCurrent(void **context) { return *context = &count, 0; }

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxPopCurrent)
NOTHING(cuCtxPushCurrent)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
