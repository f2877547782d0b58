#include "cpu/lane_plan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace recon3d {
namespace {
// Instructions per element of one stage, loads and stores included; a large prime costs a sum over its elements.
double cost(int radix) {
  switch (radix) {
    case 2:
      return 6.5;
    case 3:
      return 7.8;
    case 4:
      return 7.8;
    case 5:
      return 9.2;
    case 6:
      return 9.3;
    case 7:
      return 11.0;
    case 8:
      return 9.3;
    case 10:
      return 10.7;
    default:
      return 4.0 + 2.0 * radix;
  }
}

// The cheapest product of radices; fills `best` with the radices of n.
double cheapest(int n, std::map<int, std::pair<double, int>>& memo) {
  if (n == 1) return 0;
  const auto found = memo.find(n);
  if (found != memo.end()) return found->second.first;
  std::pair<double, int> best{0, 0};
  auto consider = [&](int r) {
    const double total = cost(r) + cheapest(n / r, memo);
    if (!best.second || total < best.first) best = {total, r};
  };
  for (const int r : kRadices)
    if (n % r == 0) consider(r);
  if (!best.second) {
    int prime = 11;
    while (n % prime && prime * prime <= n) prime += 2;
    consider(n % prime ? n : prime);
  }
  memo[n] = best;
  return best.first;
}

// exp(sign 2 pi i j / of)
template <class T>
void push_root(std::vector<T>& table, int sign, int64_t j, int64_t of) {
  const double angle = sign * 2 * 3.14159265358979323846 * static_cast<double>(j % of) / static_cast<double>(of);
  table.push_back(static_cast<T>(std::cos(angle)));
  table.push_back(static_cast<T>(std::sin(angle)));
}

template <class T>
std::unique_ptr<const LanePlan<T>> make_plan(int n, int sign) {
  auto plan = std::make_unique<LanePlan<T>>();
  plan->n = n;
  plan->sign = sign;
  plan->work = 2 * n;
  auto push = [&](int64_t j, int64_t of) { push_root(plan->table, sign, j, of); };
  int rest = n, span = 1;
  for (const int r : lane_radices(n)) {
    LaneStage stage{r, rest / r, span, plan->table.size(), 0};
    for (int group = 0; group < stage.groups; ++group)
      for (int k = 1; k < r; ++k) push(static_cast<int64_t>(group) * k, rest);
    if (!has_butterfly(r)) {
      stage.roots = plan->table.size();
      for (int j = 0; j < r; ++j) push(j, r);
      plan->work = std::max(plan->work, 2 * n + r);
    }
    plan->stages.push_back(stage);
    rest /= r;
    span *= r;
  }
  return plan;
}

template <class T>
std::unique_ptr<const NormalPlan<T>> make_normal_plan(int n) {
  auto plan = std::make_unique<NormalPlan<T>>();
  plan->n = n;
  plan->work = n;
  std::vector<int> radices = n > 1 ? lane_radices(n) : std::vector<int>{1};
  std::sort(radices.begin(), radices.end());
  int block = n;
  for (const int r : radices) {
    NormalStage stage{r, block / r, plan->table.size(), 0};
    for (int p = 0; p < stage.step; ++p)
      for (int k = 1; k < r; ++k) push_root(plan->table, -1, static_cast<int64_t>(p) * k, block);
    if (!has_butterfly(r)) {
      stage.roots = plan->table.size();
      for (int j = 0; j < r; ++j) push_root(plan->table, -1, j, r);
      plan->work = std::max(plan->work, n + r);
    }
    plan->stages.push_back(stage);
    block /= r;
  }
  for (int place = 0; place < n; ++place) {
    int rest = place, frequency = 0, weight = 1;
    for (const NormalStage& stage : plan->stages) {
      frequency += rest / stage.step * weight;
      rest %= stage.step;
      weight *= stage.radix;
    }
    plan->order.push_back(frequency);
  }
  return plan;
}
}  // namespace

bool has_butterfly(int r) {
  if (r == 1) return true;
  for (const int known : kRadices)
    if (r == known) return true;
  return false;
}

std::vector<int> lane_radices(int n) {
  std::map<int, std::pair<double, int>> memo;
  cheapest(n, memo);
  std::vector<int> radices;
  for (int rest = n; rest > 1; rest /= radices.back()) radices.push_back(memo[rest].second);
  return radices;
}

template <class T>
const LanePlan<T>& lane_plan(int n, int sign) {
  // never destroyed: threads may outlive static objects
  static auto* lock = new std::mutex;
  static auto* plans = new std::map<std::pair<int, int>, std::unique_ptr<const LanePlan<T>>>;
  const std::lock_guard<std::mutex> guard(*lock);
  auto& slot = (*plans)[{n, sign}];
  if (!slot) slot = make_plan<T>(n, sign);
  return *slot;
}
template const LanePlan<float>& lane_plan<float>(int, int);
template const LanePlan<double>& lane_plan<double>(int, int);

template <class T>
const NormalPlan<T>& normal_plan(int n) {
  static auto* lock = new std::mutex;
  static auto* plans = new std::map<int, std::unique_ptr<const NormalPlan<T>>>;
  const std::lock_guard<std::mutex> guard(*lock);
  auto& slot = (*plans)[n];
  if (!slot) slot = make_normal_plan<T>(n);
  return *slot;
}
template const NormalPlan<float>& normal_plan<float>(int);
template const NormalPlan<double>& normal_plan<double>(int);

int next_fast_length(int n) {
  for (int m = n < 2 ? 2 : n + n % 2;; m += 2) {
    int rest = m;
    for (const int r : {2, 3, 5})
      while (rest % r == 0) rest /= r;
    if (rest == 1) return m;
  }
}

int lane_level() {
  const char* asked = std::getenv("RECON3D_ISA");
  const int most = !asked || !std::strcmp(asked, "avx512") ? 3 : (!std::strcmp(asked, "avx2") ? 2 : 0);
#ifdef RECON3D_X86_LEVELS
  if (most >= 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return 3;
  if (most >= 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#else
  (void)most;
#endif
  return 0;
}

void wish_large_pages(void* memory, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + 4095) / 4096 * 4096;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / 4096 * 4096;
  if (end > begin && end - begin >= (uintptr_t{2} << 20))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace recon3d
