// The public CPU functions: arguments checked, then handed to the kernels of the best instruction set at hand.
#include "cpu/dispatch.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "tde/alpha_sweep.h"
#include "tde/background_exempt.h"
#include "tde/cross_entropy.h"
#include "tde/logits.h"

namespace tde {
namespace {

struct Choice {
  const char* name;
  const cpu::Kernels* kernels;
};

// TDE_CPU_ISA=baseline|avx2|avx512 holds the choice down, to test or compare what one machine can run.
Choice choose() {
  const char* cap = std::getenv("TDE_CPU_ISA");
  const auto allowed = [cap](const char* name) { return cap == nullptr || std::strcmp(cap, name) == 0; };
#ifdef TDE_HAS_AVX512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return {"avx512", &cpu::avx512::kernels};
#endif
#ifdef TDE_HAS_AVX2
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", &cpu::avx2::kernels};
#endif
  return {"baseline", &cpu::baseline::kernels};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

// A forked child has its parent's account of a pool of threads, but not the threads: it would wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int at_hand(int threads) { return forked ? 1 : threads; }

// One of no columns needs no memory.
bool has_direction(const RowTransform& transform, const Matrix& a) { return transform.direction || a.cols == 0; }

}  // namespace

const char* cpu_instruction_set() { return choice().name; }

bool runs_on_intel() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Status normalize_rows(const Matrix& a, const RowTransform& transform, const Matrix& out, const RowByproducts& by,
                      int threads) {
  Check check("normalize_rows");
  check.cpu_matrix(a, "a").cpu_output(out, "out").same_shape(a, out, "a and out").heads(transform, a);
  check.that(has_direction(transform, a) || (!transform.alpha && !by.projections),
             "alpha and projections need a direction");
  if (check.status().ok()) choice().kernels->normalize_rows(a, transform, out, by, at_hand(threads));
  return check.status();
}

Status normalize_rows_backward(const Matrix& grad, const Matrix& a, const float* norms, const RowTransform& transform,
                               const Matrix& grad_a, float* grad_divisor, int threads) {
  Check check("normalize_rows_backward");
  check.cpu_matrix(grad, "grad").cpu_matrix(a, "a").cpu_output(grad_a, "grad_a").heads(transform, a);
  check.same_shape(grad, a, "grad and a").same_shape(grad_a, a, "grad_a and a");
  check.that(grad_a.dtype == a.dtype, "grad_a must have the dtype of a");
  check.that(norms || a.rows == 0, "norms are missing");
  check.that(has_direction(transform, a) || !transform.alpha, "alpha needs a direction");
  check.that(transform.divisor || !grad_divisor, "there is no divisor to take the gradient of");
  if (check.status().ok())
    choice().kernels->normalize_rows_backward(grad, a, norms, transform, grad_a, grad_divisor, at_hand(threads));
  return check.status();
}

Status row_norms(const Matrix& a, int64_t heads, float* norms, int threads) {
  Check check("row_norms");
  check.cpu_matrix(a, "a").heads({heads, {}}, a).that(norms || a.rows == 0, "there is nowhere to write the norms");
  if (check.status().ok()) choice().kernels->row_norms(a, heads, norms, at_hand(threads));
  return check.status();
}

Status feature_sum(const Matrix& x, const bool* mask, float* feature_sum, int threads) {
  Check check("feature_sum");
  check.cpu_matrix(x, "x").that(feature_sum, "there is nowhere to write the sum");
  if (check.status().ok()) choice().kernels->feature_sum(x, mask, feature_sum, at_hand(threads));
  return check.status();
}

Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum) {
  Check check("fold_ema");
  check.that(dim >= 0 && (ema || dim == 0) && feature_sum, "ema, its size and the sum to fold in are needed");
  if (!check.status().ok()) return check.status();
  const float count = feature_sum[dim];
  if (count == 0) return {};
  for (int64_t i = 0; i < dim; ++i) ema[i] = momentum * ema[i] + feature_sum[i] / count;
  if (num_updates) ++*num_updates;
  return {};
}

Status head_direction(const float* ema, int64_t dim, int64_t heads, float* direction, int threads) {
  const auto row = [dim](const float* data) { return Matrix{const_cast<float*>(data), DType::f32, 1, dim, dim}; };
  return normalize_rows(row(ema), {heads, {0, 1}}, row(direction), {}, threads);
}

namespace {

void check_operands(Check& check, const Operands& of) {
  const auto& [features, weights] = of;
  check.cpu_matrix(features.a, "features").cpu_matrix(weights.a, "weights");
  check.heads(features.transform, features.a).heads(weights.transform, weights.a);
  check.that(features.a.cols == weights.a.cols,
             "features " + shape(features.a) + " and weights " + shape(weights.a) + " differ in columns");
  check.that(features.a.dtype == weights.a.dtype, "features and weights differ in dtype");
  check.that(features.transform.heads == weights.transform.heads, "features and weights differ in heads");
  check.that(has_direction(features.transform, features.a) || !features.transform.alpha, "alpha needs a direction");
  check.that(!weights.transform.direction, "the weights have no direction");
}

void check_logits(Check& check, const Matrix& logits, const Operands& of, const char* name) {
  check.cpu_matrix(logits, name);
  check.that(logits.rows == of.features.a.rows && logits.cols == of.weights.a.rows,
             std::string(name) + " " + shape(logits) + " does not fit features and weights");
  check.that(logits.dtype == of.features.a.dtype, std::string(name) + " must have the dtype of the operands");
}

}  // namespace

Status small_logits(const Operands& of, const EmaUpdate& update, const Matrix& out, int threads) {
  Check check("small_logits");
  check_operands(check, of);
  check_logits(check, out, of, "out");
  check.cpu_output(out, "out");
  if (!check.status().ok()) return check.status();
  const int64_t dim = of.features.a.cols;
  std::vector<float> own_sum(update.ema && !update.feature_sum ? dim + 1 : 0);
  float* sum = own_sum.empty() ? update.feature_sum : own_sum.data();
  choice().kernels->small_logits(of, update.mask, sum, out, at_hand(threads));
  return update.ema ? fold_ema(update.ema, update.num_updates, sum, dim, update.momentum) : Status{};
}

Status small_logits_backward(const Operands& of, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_w,
                             float* grad_divisor, int threads) {
  Check check("small_logits_backward");
  check_operands(check, of);
  check_logits(check, grad, of, "grad");
  for (const auto& [gradient, own] : {std::pair{&grad_x, &of.features}, std::pair{&grad_w, &of.weights}}) {
    if (!gradient->data) continue;
    check.cpu_output(*gradient, "a gradient").same_shape(*gradient, own->a, "an operand and its gradient");
    check.that(gradient->dtype == own->a.dtype, "a gradient must have the dtype of its operand");
  }
  check.that(!grad_divisor || (of.weights.transform.divisor && grad_w.data),
             "the divisor's gradient needs that of weights");
  if (check.status().ok())
    choice().kernels->small_logits_backward(of, grad, grad_x, grad_w, grad_divisor, at_hand(threads));
  return check.status();
}

Status background_exempt(const Matrix& logits, const float* row_projections, const float* class_projections,
                         int64_t heads, const float* alpha, int64_t background, bool log, const Matrix& out,
                         int threads) {
  Check check("background_exempt");
  check.cpu_matrix(logits, "logits").cpu_output(out, "out");
  check.exempt(logits, row_projections, class_projections, heads, alpha, background, out);
  if (check.status().ok())
    choice().kernels->background_exempt(logits, row_projections, class_projections, heads, alpha, background, log, out,
                                        at_hand(threads));
  return check.status();
}

Status cross_entropy(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, int threads) {
  Check check("cross_entropy");
  check.cpu_matrix(logits, "logits").loss(logits, loss, pass);
  if (pass.gradient) check.cpu_output(logits, "logits");
  if (check.status().ok()) choice().kernels->cross_entropy(logits, loss, pass, at_hand(threads));
  return check.status();
}

namespace {

void check_lines(Check& check, const Lines& lines) {
  check.cpu_matrix(lines.logits, "logits");
  check.that(lines.logits.dtype == DType::f32, "logits must be float32: they are compared with one another");
  check.that(lines.logits.cols > 0 || lines.logits.rows == 0, "there are no classes");
  check.that(lines.heads >= 1 && lines.class_projections && (lines.row_projections || lines.logits.rows == 0),
             "at least one head and its projections are needed");
}

}  // namespace

Status alpha_sweep(const Lines& lines, const double* alphas, int64_t steps, int64_t* winners, int64_t stride,
                   int threads) {
  Check check("alpha_sweep");
  check_lines(check, lines);
  check.that(steps >= 1 && alphas && (winners || lines.logits.rows == 0),
             "alphas, and memory for the winners, are needed");
  check.that(steps <= 1 || stride >= lines.logits.rows, "winners of one alpha overlap those of the next");
  if (check.status().ok()) choice().kernels->alpha_sweep(lines, alphas, steps, winners, stride, at_hand(threads));
  return check.status();
}

Status alpha_segments(const Lines& lines, int64_t most, double* starts, int64_t* classes, int64_t* counts,
                      int threads) {
  Check check("alpha_segments");
  check_lines(check, lines);
  check.that(most >= 1 && ((starts && classes && counts) || lines.logits.rows == 0),
             "memory for the segments is needed");
  if (check.status().ok()) choice().kernels->alpha_segments(lines, most, starts, classes, counts, at_hand(threads));
  return check.status();
}

}  // namespace tde
