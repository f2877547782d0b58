// The current CUDA stream through torch's stable ABI. Weak, so that the library also loads beside a CPU-only torch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace recon3d {
inline void* cuda_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "recon3d has CUDA kernels but this torch has no CUDA");
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(device_index, &stream);
  return stream;
}
}  // namespace recon3d
