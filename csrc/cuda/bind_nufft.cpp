#include <vector>

#include "bind.h"
#include "cuda/nufft.h"
#include "cuda/stream.h"

namespace recon3d {
namespace {
using Sizes = std::vector<int64_t>;

bool is_double(const Tensor& t, const char* name) {
  const bool found = t.scalar_type() == ScalarType::ComplexDouble;
  STD_TORCH_CHECK(found || t.scalar_type() == ScalarType::ComplexFloat, name, ": complex64 or complex128 expected");
  return found;
}

void check_real(const Tensor& t, const Tensor& data, const char* name) {
  const bool wide = data.scalar_type() == ScalarType::ComplexDouble;
  STD_TORCH_CHECK(t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) && t.is_cuda(), name,
                  ": weights and scale must be real, in the precision and on the device of the data");
}

// Sizes of pad and crop: the data's own and the others.
cuda::NufftGrid box_of(const Sizes& shape, const Sizes& grid, const Tensor& scale, const char* name) {
  STD_TORCH_CHECK(shape.size() == grid.size() && !grid.empty() && grid.size() <= 3, name,
                  ": one to three axes expected");
  cuda::NufftGrid g = {static_cast<int>(grid.size()), {1, 1, 1}, {1, 1, 1}, 0, 1, 1};
  int64_t all = 0;
  for (size_t a = 0; a < grid.size(); ++a) {
    STD_TORCH_CHECK(shape[a] > 0 && shape[a] <= grid[a] && grid[a] < (1 << 24), name,
                    ": every axis of the image must be at least one pixel and fit the grid");
    g.shape[a] = shape[a];
    g.grid[a] = grid[a];
    all += shape[a];
  }
  STD_TORCH_CHECK(scale.dim() == 1 && scale.numel() == all, name, ": scale must hold one value per pixel of each axis");
  return g;
}

Sizes sizes_of(const Tensor& t, int64_t from) {
  Sizes found;
  for (int64_t d = from; d < t.dim(); ++d) found.push_back(t.size(d));
  return found;
}
Sizes with_batch(int64_t batch, const Sizes& rest) {
  Sizes all{batch};
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

Tensor pad(const Tensor& x, const Tensor& scale, Sizes grid) {
  const cuda::NufftGrid g = box_of(sizes_of(x, 1), grid, scale, "nufft_pad");
  check_real(scale, x, "nufft_pad");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor xc = torch::stable::contiguous(x), sc = torch::stable::contiguous(scale);
  Tensor cells = torch::stable::new_empty(x, with_batch(x.size(0), grid));
  void* stream = cuda_stream(x.get_device_index());
  const char* error = is_double(x, "nufft_pad")
                          ? cuda::nufft_pad(in<double>(xc), out<double>(cells), x.size(0), g, in<double>(sc), stream)
                          : cuda::nufft_pad(in<float>(xc), out<float>(cells), x.size(0), g, in<float>(sc), stream);
  STD_TORCH_CHECK(error == nullptr, "nufft_pad: ", error);
  return cells;
}

Tensor crop(const Tensor& cells, const Tensor& scale, Sizes shape) {
  const cuda::NufftGrid g = box_of(shape, sizes_of(cells, 1), scale, "nufft_crop");
  check_real(scale, cells, "nufft_crop");
  const torch::stable::accelerator::DeviceGuard guard(cells.get_device_index());
  const Tensor cc = torch::stable::contiguous(cells), sc = torch::stable::contiguous(scale);
  Tensor x = torch::stable::new_empty(cells, with_batch(cells.size(0), shape));
  void* stream = cuda_stream(cells.get_device_index());
  const char* error = is_double(cells, "nufft_crop")
                          ? cuda::nufft_crop(in<double>(cc), out<double>(x), cells.size(0), g, in<double>(sc), stream)
                          : cuda::nufft_crop(in<float>(cc), out<float>(x), cells.size(0), g, in<float>(sc), stream);
  STD_TORCH_CHECK(error == nullptr, "nufft_crop: ", error);
  return x;
}

// The plan's tensors, checked and contiguous.
struct Plan {
  Tensor order, first, weights, tiles;
  cuda::NufftGrid g;
  int64_t cells;
};

Plan plan_of(const Tensor& data, const Tensor& order, const Tensor& first, const Tensor& weights, const Tensor& tiles,
             const Sizes& grid, int64_t tile, const char* name) {
  const int64_t axes = static_cast<int64_t>(grid.size()), points = order.numel();
  STD_TORCH_CHECK(axes >= 1 && axes <= 3 && tile >= 8 && tile < (1 << 16), name, ": one to three axes expected");
  STD_TORCH_CHECK(order.dim() == 1 && first.dim() == 2 && first.size(0) == points && first.size(1) == axes &&
                      weights.dim() == 3 && weights.size(0) == points && weights.size(1) == axes &&
                      weights.size(2) >= 1 && weights.size(2) <= 16,
                  name, ": order [M], first [M, d] and weights [M, d, w], w at most 16, expected");
  for (const Tensor& t : {order, first, tiles})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cuda(), name, ": the plan must be int32 on the device");
  check_real(weights, data, name);
  cuda::NufftGrid g = {static_cast<int>(axes), {1, 1, 1}, {1, 1, 1}, points, static_cast<int>(weights.size(2)),
                       static_cast<int>(tile)};
  int64_t cells = 1, of = 1;
  for (int64_t a = 0; a < axes; ++a) {
    const int64_t n = grid[static_cast<size_t>(a)];
    STD_TORCH_CHECK(n == 1 || (n >= weights.size(2) && n < (1 << 24)), name,
                    ": a grid axis is shorter than the kernel");
    g.grid[a] = n;
    cells *= n;
    of *= (n + tile - 1) / tile;
  }
  STD_TORCH_CHECK(cells < (int64_t{1} << 31) && tiles.dim() == 1 && tiles.numel() == of + 1, name,
                  ": tiles must hold one more entry than the grid has tiles");
  return {torch::stable::contiguous(order),
          torch::stable::contiguous(first),
          torch::stable::contiguous(weights),
          torch::stable::contiguous(tiles),
          g,
          cells};
}

Tensor interpolate(const Tensor& cells, const Tensor& order, const Tensor& first, const Tensor& weights,
                   const Tensor& tiles, Sizes grid, int64_t tile) {
  const char* name = "nufft_interpolate";
  const bool wide = is_double(cells, name);
  const Plan plan = plan_of(cells, order, first, weights, tiles, grid, tile, name);
  STD_TORCH_CHECK(cells.dim() == 2 && cells.size(1) == plan.cells, "nufft_interpolate: cells must be [b, prod(grid)]");
  const torch::stable::accelerator::DeviceGuard guard(cells.get_device_index());
  const int64_t batch = cells.size(0);
  const Tensor cc = torch::stable::contiguous(cells);
  Tensor y = torch::stable::new_empty(cells, {batch, plan.g.points});
  if (batch == 0) return y;
  const size_t bytes =
      wide ? cuda::nufft_workspace<double>(batch, plan.g, false) : cuda::nufft_workspace<float>(batch, plan.g, false);
  Tensor work = torch::stable::new_empty(cells, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  void* stream = cuda_stream(cells.get_device_index());
  const int32_t *o = in<int32_t>(plan.order), *f = in<int32_t>(plan.first);
  const char* error = wide ? cuda::nufft_interpolate(in<double>(cc), out<double>(y), batch, plan.g, o, f,
                                                     in<double>(plan.weights), work.mutable_data_ptr(), stream)
                           : cuda::nufft_interpolate(in<float>(cc), out<float>(y), batch, plan.g, o, f,
                                                     in<float>(plan.weights), work.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == nullptr, "nufft_interpolate: ", error);
  return y;
}

Tensor spread(const Tensor& y, const Tensor& order, const Tensor& first, const Tensor& weights, const Tensor& tiles,
              Sizes grid, int64_t tile) {
  const char* name = "nufft_spread";
  const bool wide = is_double(y, name);
  const Plan plan = plan_of(y, order, first, weights, tiles, grid, tile, name);
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) == plan.g.points, "nufft_spread: y must be [b, M]");
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const int64_t batch = y.size(0);
  const Tensor yc = torch::stable::contiguous(y);
  Tensor cells = torch::stable::new_empty(y, {batch, plan.cells});
  if (batch == 0) return cells;
  const size_t bytes =
      wide ? cuda::nufft_workspace<double>(batch, plan.g, true) : cuda::nufft_workspace<float>(batch, plan.g, true);
  Tensor work = torch::stable::new_empty(y, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  void* stream = cuda_stream(y.get_device_index());
  const int32_t *o = in<int32_t>(plan.order), *f = in<int32_t>(plan.first), *t = in<int32_t>(plan.tiles);
  const char* error = wide ? cuda::nufft_spread(in<double>(yc), out<double>(cells), batch, plan.g, o, f,
                                                in<double>(plan.weights), t, work.mutable_data_ptr(), stream)
                           : cuda::nufft_spread(in<float>(yc), out<float>(cells), batch, plan.g, o, f,
                                                in<float>(plan.weights), t, work.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == nullptr, "nufft_spread: ", error);
  return cells;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CUDA, m) {
  m.impl("nufft_pad", TORCH_BOX(&recon3d::pad));
  m.impl("nufft_crop", TORCH_BOX(&recon3d::crop));
  m.impl("nufft_interpolate", TORCH_BOX(&recon3d::interpolate));
  m.impl("nufft_spread", TORCH_BOX(&recon3d::spread));
}
