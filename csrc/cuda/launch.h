// Starting a kernel: returns null or why it could not start. Never synchronises.
#pragma once
#include <cuda_runtime.h>

#ifndef RECON3D_EMULATED  // tests run kernels on the host under their own cuda_runtime.h
namespace recon3d {
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, void* stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(P(arguments)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* fill_zero(void* to, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
}  // namespace recon3d
#endif
