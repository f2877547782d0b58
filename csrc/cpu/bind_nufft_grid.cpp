#include <vector>

#include "bind.h"
#include "cpu/nufft_grid.h"

namespace recon3d {
namespace {
constexpr int64_t kPiece = 1024;  // points of a thread at a time

struct Plan {
  Tensor order, first, weights;
  GridPoints g;
  int64_t cells;
};

// Checks the plan against the data and that no tap can leave the grid.
Plan plan_of(const Tensor& data, const Tensor& order, const Tensor& first, const Tensor& weights,
             const std::vector<int64_t>& grid, const char* name) {
  const bool wide = data.scalar_type() == ScalarType::ComplexDouble;
  STD_TORCH_CHECK(wide || data.scalar_type() == ScalarType::ComplexFloat, name, ": complex64 or complex128 expected");
  const int64_t axes = static_cast<int64_t>(grid.size()), points = order.numel();
  STD_TORCH_CHECK(axes >= 1 && axes <= 3 && order.dim() == 1 && first.dim() == 2 && first.size(0) == points &&
                      first.size(1) == axes && weights.dim() == 3 && weights.size(0) == points &&
                      weights.size(1) == axes && weights.size(2) >= 1,
                  name, ": order [M], first [M, d] and weights [M, d, w] expected");
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int && first.scalar_type() == ScalarType::Int &&
                      weights.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  name, ": the plan must be int32, its weights real in the precision of the data");
  Plan plan = {
      torch::stable::contiguous(order), torch::stable::contiguous(first), torch::stable::contiguous(weights), {}, 1};
  GridPoints& g = plan.g;
  g.axes = static_cast<int>(axes);
  g.points = points;
  g.width = static_cast<int>(weights.size(2));
  g.order = in<int32_t>(plan.order);
  g.first = in<int32_t>(plan.first);
  for (int64_t a = 0; a < axes; ++a) {
    const int64_t n = grid[static_cast<size_t>(a)];
    STD_TORCH_CHECK(n == 1 || n >= g.width, name, ": a grid axis is shorter than the kernel");
    g.grid[a] = n;
    plan.cells *= n;
  }
  for (int64_t p = 0; p < points; ++p) {
    STD_TORCH_CHECK(g.order[p] >= 0 && g.order[p] < points, name, ": order leaves the points");
    for (int64_t a = 0; a < axes; ++a)
      STD_TORCH_CHECK(g.first[p * axes + a] >= 0 && g.first[p * axes + a] < g.grid[a], name, ": first leaves the grid");
  }
  return plan;
}

Tensor interpolate(const Tensor& cells, const Tensor& order, const Tensor& first, const Tensor& weights, const Tensor&,
                   std::vector<int64_t> grid, int64_t) {
  const Plan plan = plan_of(cells, order, first, weights, grid, "nufft_interpolate");
  STD_TORCH_CHECK(cells.dim() == 2 && cells.size(1) == plan.cells, "nufft_interpolate: cells must be [b, prod(grid)]");
  const Tensor from = torch::stable::contiguous(cells);
  const int64_t batch = cells.size(0);
  Tensor y = torch::stable::new_empty(cells, {batch, plan.g.points});
  const bool wide = cells.scalar_type() == ScalarType::ComplexDouble;
  torch::stable::parallel_for(0, plan.g.points, kPiece, [&](int64_t begin, int64_t end) {
    if (wide)
      interpolate_cpu(in<double>(from), out<double>(y), plan.g, in<double>(plan.weights), 0, batch, begin, end);
    else
      interpolate_cpu(in<float>(from), out<float>(y), plan.g, in<float>(plan.weights), 0, batch, begin, end);
  });
  return y;
}

Tensor spread(const Tensor& y, const Tensor& order, const Tensor& first, const Tensor& weights, const Tensor&,
              std::vector<int64_t> grid, int64_t) {
  const Plan plan = plan_of(y, order, first, weights, grid, "nufft_spread");
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) == plan.g.points, "nufft_spread: y must be [b, M]");
  const Tensor from = torch::stable::contiguous(y);
  const int64_t batch = y.size(0);
  Tensor cells = torch::stable::new_empty(y, {batch, plan.cells});
  const bool wide = y.scalar_type() == ScalarType::ComplexDouble;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    if (wide)
      spread_cpu(in<double>(from), out<double>(cells), plan.g, in<double>(plan.weights), begin, end);
    else
      spread_cpu(in<float>(from), out<float>(cells), plan.g, in<float>(plan.weights), begin, end);
  });
  return cells;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("nufft_interpolate", TORCH_BOX(&recon3d::interpolate));
  m.impl("nufft_spread", TORCH_BOX(&recon3d::spread));
}
