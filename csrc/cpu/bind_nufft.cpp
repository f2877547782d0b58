#include <tuple>
#include <vector>

#include "bind.h"
#include "cpu/nufft.h"

namespace recon3d {
namespace {
NufftThreads all_threads() {
  return {[](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            if (n > 0)
              torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

// Calls body with scalar_t = float or double for complex64 or complex128.
#define RECON3D_NUFFT(TENSOR, NAME, ...)                                                                             \
  if ((TENSOR).scalar_type() == ScalarType::ComplexFloat) {                                                          \
    using scalar_t = float;                                                                                          \
    __VA_ARGS__                                                                                                      \
  } else {                                                                                                           \
    STD_TORCH_CHECK((TENSOR).scalar_type() == ScalarType::ComplexDouble, NAME ": complex64 or complex128 expected"); \
    using scalar_t = double;                                                                                         \
    __VA_ARGS__                                                                                                      \
  }

// The tensors of a plan, held while their pointers are in use.
struct Plan {
  Tensor order, first, weights, scale, tiles;
  Plan(const Tensor& o, const Tensor& f, const Tensor& w, const Tensor& s, const Tensor& t)
      : order(torch::stable::contiguous(o)),
        first(torch::stable::contiguous(f)),
        weights(torch::stable::contiguous(w)),
        scale(torch::stable::contiguous(s)),
        tiles(torch::stable::contiguous(t)) {}

  template <class T>
  NufftPoints<T> points(const char* op, const std::vector<int64_t>& shape, const std::vector<int64_t>& grid,
                        int64_t tile) const {
    const ScalarType real = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
    const int64_t d = static_cast<int64_t>(grid.size()), count = order.numel();
    STD_TORCH_CHECK(d >= 1 && d <= 3 && static_cast<int64_t>(shape.size()) == d && tile > 0, op,
                    ": one to three axes expected");
    STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int && first.scalar_type() == ScalarType::Int &&
                        tiles.scalar_type() == ScalarType::Int,
                    op, ": order, first and tiles must be int32");
    STD_TORCH_CHECK(weights.scalar_type() == real && scale.scalar_type() == real, op,
                    ": weights and scale must be real in the precision of the data");
    STD_TORCH_CHECK(first.dim() == 2 && first.size(0) == count && first.size(1) == d && weights.dim() == 3 &&
                        weights.size(0) == count && weights.size(1) == d && weights.size(2) <= 16,
                    op, ": first must be [M, d] and weights [M, d, w]");
    NufftPoints<T> p{};
    p.count = count;
    p.axes = static_cast<int>(d);
    p.width = static_cast<int>(weights.size(2));
    p.tile = static_cast<int>(tile);
    p.order = in<int32_t>(order);
    p.first = in<int32_t>(first);
    p.tiles = in<int32_t>(tiles);
    p.weights = in<T>(weights);
    static const T one = 1;
    int64_t pixels = 0, cells = 1;
    for (int a = 0; a < 3; ++a) {
      const int64_t axis = a - 3 + d;
      p.n[a] = p.g[a] = p.taps[a] = 1;
      p.scale[a] = &one;
      if (axis < 0) continue;
      STD_TORCH_CHECK(shape[axis] >= 1 && shape[axis] <= grid[axis] && grid[axis] < (1 << 24) &&
                          (grid[axis] == 1 || grid[axis] >= p.width),
                      op, ": the grid must hold the image and the kernel");
      p.n[a] = static_cast<int>(shape[axis]);
      p.g[a] = static_cast<int>(grid[axis]);
      p.taps[a] = p.g[a] > 1 ? p.width : 1;
      p.scale[a] = in<T>(scale) + pixels;
      pixels += p.n[a];
      cells *= (grid[axis] + tile - 1) / tile;
    }
    STD_TORCH_CHECK(scale.numel() == pixels && tiles.numel() == cells + 1, op, ": scale or tiles of another plan");
    return p;
  }
};

// The axes of t before the last `d`, then `tail`; *leading is the product of the former.
std::vector<int64_t> with_tail(const Tensor& t, int64_t d, const std::vector<int64_t>& tail, int64_t* leading) {
  std::vector<int64_t> shape;
  *leading = 1;
  for (int64_t a = 0; a + d < t.dim(); ++a) {
    shape.push_back(t.size(a));
    *leading *= t.size(a);
  }
  shape.insert(shape.end(), tail.begin(), tail.end());
  return shape;
}
std::vector<int64_t> last_axes(const Tensor& t, int64_t d) {
  std::vector<int64_t> shape;
  for (int64_t a = t.dim() - d; a < t.dim(); ++a) shape.push_back(t.size(a));
  return shape;
}

Tensor nufft(const Tensor& x, const Tensor& order, const Tensor& first, const Tensor& weights, const Tensor& scale,
             const Tensor& tiles, std::vector<int64_t> grid, int64_t tile) {
  const int64_t d = static_cast<int64_t>(grid.size());
  STD_TORCH_CHECK(x.dim() >= d, "nufft: x must be [..., [z,] y, x]");
  const Plan plan(order, first, weights, scale, tiles);
  const Tensor xc = torch::stable::contiguous(x);
  int64_t images;
  Tensor y = torch::stable::new_empty(x, with_tail(x, d, {plan.order.numel()}, &images));
  if (images) {
    RECON3D_NUFFT(x, "nufft", {
      const auto points = plan.points<scalar_t>("nufft", last_axes(x, d), grid, tile);
      wish_large_pages(out<scalar_t>(y), sizeof(scalar_t) * 2 * y.numel());
      nufft_run<scalar_t>(NufftTransform::kForward,
                          {&points, images, false, in<scalar_t>(xc), out<scalar_t>(y), nullptr}, all_threads());
    })
  }
  return y;
}

Tensor nufft_adjoint(const Tensor& y, const Tensor& order, const Tensor& first, const Tensor& weights,
                     const Tensor& scale, const Tensor& tiles, std::vector<int64_t> shape, std::vector<int64_t> grid,
                     int64_t tile) {
  const Plan plan(order, first, weights, scale, tiles);
  STD_TORCH_CHECK(y.dim() >= 1 && y.size(y.dim() - 1) == plan.order.numel(), "nufft_adjoint: y must be [..., M]");
  const Tensor yc = torch::stable::contiguous(y);
  int64_t images;
  Tensor x = torch::stable::new_empty(y, with_tail(y, 1, shape, &images));
  if (images) {
    RECON3D_NUFFT(y, "nufft_adjoint", {
      const auto points = plan.points<scalar_t>("nufft_adjoint", shape, grid, tile);
      wish_large_pages(out<scalar_t>(x), sizeof(scalar_t) * 2 * x.numel());
      nufft_run<scalar_t>(NufftTransform::kAdjoint,
                          {&points, images, false, in<scalar_t>(yc), out<scalar_t>(x), nullptr}, all_threads());
    })
  }
  return x;
}

Tensor nufft_normal(const Tensor& x, const Tensor& density, const Tensor& order, const Tensor& first,
                    const Tensor& weights, const Tensor& scale, const Tensor& tiles, std::vector<int64_t> grid,
                    int64_t tile) {
  const int64_t d = static_cast<int64_t>(grid.size());
  STD_TORCH_CHECK(x.dim() >= d, "nufft_normal: x must be [..., [z,] y, x]");
  const Plan plan(order, first, weights, scale, tiles);
  const Tensor xc = torch::stable::contiguous(x), dc = torch::stable::contiguous(density);
  STD_TORCH_CHECK(
      dc.scalar_type() == plan.weights.scalar_type() && (dc.numel() == 0 || dc.numel() == plan.order.numel()),
      "nufft_normal: density must be [M] real in the precision of x, or empty");
  int64_t images;
  Tensor result = torch::stable::new_empty(x, with_tail(x, 0, {}, &images));
  images = 1;
  for (int64_t a = 0; a + d < x.dim(); ++a) images *= x.size(a);
  if (images) {
    RECON3D_NUFFT(x, "nufft_normal", {
      const auto points = plan.points<scalar_t>("nufft_normal", last_axes(x, d), grid, tile);
      wish_large_pages(out<scalar_t>(result), sizeof(scalar_t) * 2 * result.numel());
      nufft_run<scalar_t>(
          NufftTransform::kNormal,
          {&points, images, false, in<scalar_t>(xc), out<scalar_t>(result), dc.numel() ? in<scalar_t>(dc) : nullptr},
          all_threads());
    })
  }
  return result;
}

Tensor nufft_lanes(const Tensor& x, const Tensor& order, const Tensor& first, const Tensor& weights,
                   const Tensor& scale, const Tensor& tiles, std::vector<int64_t> grid, int64_t tile) {
  const int64_t d = static_cast<int64_t>(grid.size());
  STD_TORCH_CHECK(x.dim() == d + 2 && x.size(d + 1) == kChunk, "nufft_lanes: x must be [chunk, ([z,] y, x), 8]");
  const Plan plan(order, first, weights, scale, tiles);
  const Tensor xc = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), plan.order.numel(), kChunk});
  std::vector<int64_t> shape = last_axes(x, d + 1);
  shape.pop_back();
  if (x.size(0)) {
    RECON3D_NUFFT(x, "nufft_lanes", {
      const auto points = plan.points<scalar_t>("nufft_lanes", shape, grid, tile);
      wish_large_pages(out<scalar_t>(y), sizeof(scalar_t) * 2 * y.numel());
      nufft_run<scalar_t>(NufftTransform::kForward,
                          {&points, x.size(0) * kChunk, true, in<scalar_t>(xc), out<scalar_t>(y), nullptr},
                          all_threads());
    })
  }
  return y;
}

Tensor nufft_lanes_adjoint(const Tensor& y, const Tensor& order, const Tensor& first, const Tensor& weights,
                           const Tensor& scale, const Tensor& tiles, std::vector<int64_t> shape,
                           std::vector<int64_t> grid, int64_t tile) {
  const Plan plan(order, first, weights, scale, tiles);
  STD_TORCH_CHECK(y.dim() == 3 && y.size(1) == plan.order.numel() && y.size(2) == kChunk,
                  "nufft_lanes_adjoint: y must be [chunk, M, 8]");
  const Tensor yc = torch::stable::contiguous(y);
  std::vector<int64_t> size{y.size(0)};
  size.insert(size.end(), shape.begin(), shape.end());
  size.push_back(kChunk);
  Tensor x = torch::stable::new_empty(y, size);
  if (y.size(0)) {
    RECON3D_NUFFT(y, "nufft_lanes_adjoint", {
      const auto points = plan.points<scalar_t>("nufft_lanes_adjoint", shape, grid, tile);
      wish_large_pages(out<scalar_t>(x), sizeof(scalar_t) * 2 * x.numel());
      nufft_run<scalar_t>(NufftTransform::kAdjoint,
                          {&points, y.size(0) * kChunk, true, in<scalar_t>(yc), out<scalar_t>(x), nullptr},
                          all_threads());
    })
  }
  return x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nufft_sort(const Tensor& points, std::vector<int64_t> grid, int64_t width,
                                                      int64_t tile) {
  const int64_t axes = static_cast<int64_t>(grid.size());
  STD_TORCH_CHECK(points.dim() == 2 && points.size(1) == axes && points.scalar_type() == ScalarType::Double &&
                      axes >= 1 && axes <= 3 && points.size(0) < (int64_t{1} << 31),
                  "nufft_sort: points must be [M, d] float64, d the number of grid axes and M below 2^31");
  STD_TORCH_CHECK(width > 0 && tile > 0, "nufft_sort: width and tile must be positive");
  int64_t cells = 1;
  for (const int64_t g : grid) {
    STD_TORCH_CHECK(g >= 1 && g < (1 << 24), "nufft_sort: grid sizes must lie between 1 and 2^24");
    cells *= (g + tile - 1) / tile;
  }
  STD_TORCH_CHECK(cells < (int64_t{1} << 31), "nufft_sort: more than 2^31 tiles");
  const Tensor pc = torch::stable::contiguous(points);
  const int64_t count = points.size(0);
  Tensor order = torch::stable::new_empty(points, {count}, ScalarType::Int);
  Tensor first = torch::stable::new_empty(points, {count, axes}, ScalarType::Int);
  Tensor fraction = torch::stable::new_empty(points, {count, axes});
  Tensor tiles = torch::stable::new_empty(points, {cells + 1}, ScalarType::Int);
  nufft_sort_cpu(in<double>(pc), count, static_cast<int>(axes), grid.data(), static_cast<int>(width),
                 static_cast<int>(tile), out<int32_t>(order), out<int32_t>(first), out<double>(fraction),
                 out<int32_t>(tiles));
  return {order, first, fraction, tiles};
}

Tensor nufft_weights(const Tensor& fraction, const Tensor& coefficients, bool wide) {
  STD_TORCH_CHECK(fraction.dim() == 2 && coefficients.dim() == 3 && coefficients.size(0) == fraction.size(1) &&
                      fraction.scalar_type() == ScalarType::Double && coefficients.scalar_type() == ScalarType::Double,
                  "nufft_weights: fraction [M, d] and coefficients [d, w, terms] must be float64");
  const Tensor fc = torch::stable::contiguous(fraction), cc = torch::stable::contiguous(coefficients);
  const int64_t count = fraction.size(0), axes = fraction.size(1), width = cc.size(1), terms = cc.size(2);
  Tensor weights =
      torch::stable::new_empty(fraction, {count, axes, width}, wide ? ScalarType::Double : ScalarType::Float);
  const auto evaluate = [&](auto* to) {
    torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      nufft_weights_cpu(in<double>(fc), in<double>(cc), begin, end, static_cast<int>(axes), static_cast<int>(width),
                        static_cast<int>(terms), to);
    });
  };
  if (wide)
    evaluate(out<double>(weights));
  else
    evaluate(out<float>(weights));
  return weights;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("nufft", TORCH_BOX(&recon3d::nufft));
  m.impl("nufft_adjoint", TORCH_BOX(&recon3d::nufft_adjoint));
  m.impl("nufft_normal", TORCH_BOX(&recon3d::nufft_normal));
  m.impl("nufft_lanes", TORCH_BOX(&recon3d::nufft_lanes));
  m.impl("nufft_lanes_adjoint", TORCH_BOX(&recon3d::nufft_lanes_adjoint));
  m.impl("nufft_sort", TORCH_BOX(&recon3d::nufft_sort));
  m.impl("nufft_weights", TORCH_BOX(&recon3d::nufft_weights));
}
