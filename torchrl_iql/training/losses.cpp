// The losses of IQL, from what the networks put out: their gradients by it, and what is measured.
//
// With V, Q_i and pi, their targets Q^_i, and of each transition its share c in the mean, 1 / B or by its
// importance and mask, equations 5, 6 and 7 of the paper are
//
//   A    = min_i Q^_i(s, a) - V(s)          L_V  =   sum c |tau - 1(A < 0)| A^2
//   y    = r + gamma V(s')                  L_Q  =   sum c sum_i D(Q_i(s, a) - y)
//   w    = min(exp(beta A), clip)           L_pi = - sum c w log pi(a | s)
//
// where y and w are constants, and V is one in w. So the gradients of L_V + L_Q + L_pi are
//
//   by V(s)           - 2 c |tau - 1(A < 0)| A
//   by Q_i(s, a)      c D'(Q_i - y), with D(x) = x^2, |x|, or x^2 / 2 for |x| < 1 and |x| - 1/2 beyond
//   by an output o    - c w d log pi / d o
//
// A policy over choices has log pi = o_a - log sum_j exp o_j, and d log pi / d o_j = 1(j = a) - pi_j.
// One over vectors is, up to a constant of the action, which comes with the batch,
//
//   log pi = - sum_j [ p_j (u_j - mu_j)^2 + log sigma_j ],  p = 1 / (2 sigma^2),
//
// by mu_j       2 p_j (u_j - mu_j)
// by log sigma  2 p_j (u_j - mu_j)^2 - 1
//
// with u the action, or what tanh makes the action of; mu_j = o_j, or m + h tanh(o_j) within bounds,
// whose slope is h (1 - tanh^2). What is called log pi of a deterministic policy is - sum_j (u_j - mu_j)^2,
// so p = 1 and there is no sigma. The sigma of the others are parameters of no layer, and take their step
// of Adam here. They do not learn where they are clipped.
//
// One thread computes it all, in the order of the transitions. Sums are float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

enum Distance { SQUARE, ABSOLUTE, SMOOTH };
enum Mean { LOSS_ACTOR, LOSS_QVALUE, LOSS_VALUE, ADVANTAGE, VALUE, QVALUE, CLIPPED, ENTROPY, MEANS };

template <class T> struct Losses {
    int64_t batch, width, qvalues;        // outputs of a network are [batch, width], of which those
    int64_t policy_outputs, q_outputs;    // of the policy and of a Q network are no padding
    int64_t distance;
    double clip, least, most;             // of weights, and of log sigma
    const double *coefficients;           // tau, beta
    const T *outputs;                     // of pi, V, Q_1 .. Q_N, V at s', Q^_1 .. Q^_N
    T *gradients;                         // by those of pi, V, Q_1 .. Q_N
    const T *middle, *half_range;         // m and h, or null
    const T *unit;                        // of sigma
    T *log_std, *first_moment, *second_moment;  // or null
};

template <class T> struct Batch {
    const T *action;                      // u, [batch, policy_outputs], or null
    const int64_t *choice;                // a, [batch], or null
    const T *constant, *reward, *discount;
    const T *share, *loss_share;          // c, in means and in losses; 0 in means where masked
    const uint8_t *terminated;
    T *means, *td_errors;                 // [MEANS], [batch]: what is measured
};

// As std::min and std::max, but NaN if one of them is.
template <class T> T smaller(T x, T y) { return x < y || std::isnan(x) ? x : y; }
template <class T> T larger(T x, T y) { return x > y || std::isnan(x) ? x : y; }

// D(x), and its derivative.
template <class T> T distance(int64_t kind, T x, T &derivative) {
    const T sign = (x > 0) - (x < 0), size = std::abs(x);
    const bool square = kind == SQUARE || (kind == SMOOTH && !(size >= 1));
    const T half = kind == SQUARE ? 1 : T(0.5);
    derivative = square ? 2 * half * x : sign;
    return square ? half * x * x : kind == SMOOTH ? size - half : size;
}

// log pi up to a constant; `scale` times its derivatives go to those by outputs, and are added to those
// by log sigma.
template <class T>
T log_density(const Losses<T> &its, const T *outputs, const T *u, T scale, T *by_outputs,
              double *by_log_std) {
    T log_pi = 0;
    for (int64_t j = 0; j < its.policy_outputs; j++) {
        T mu = outputs[j], slope = 1, p = 1;
        if (its.half_range) {
            const T tanh = std::tanh(outputs[j]);
            mu = its.middle[j] + its.half_range[j] * tanh;
            slope = its.half_range[j] * (1 - tanh * tanh);
        }
        const T rest = u[j] - mu;
        if (its.log_std) {
            const T least = its.least, most = its.most;
            const T log_sigma = std::clamp(its.log_std[j], least, most);
            const T sigma = its.unit[j] * std::exp(log_sigma);
            p = 1 / (2 * sigma * sigma);
            log_pi -= log_sigma;
            if (least < log_sigma && log_sigma < most)
                by_log_std[j] += scale * (2 * p * rest * rest - 1);
        }
        log_pi -= p * rest * rest;
        by_outputs[j] = scale * 2 * p * rest * slope;
    }
    return log_pi;
}

template <class T>
T log_probability(const Losses<T> &its, const T *outputs, int64_t a, T scale, T *by_outputs) {
    T most = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t j = 0; j < its.policy_outputs; j++) most = larger(most, outputs[j]);
    for (int64_t j = 0; j < its.policy_outputs; j++) sum += std::exp(outputs[j] - most);
    for (int64_t j = 0; j < its.policy_outputs; j++)
        by_outputs[j] = scale * ((j == a) - std::exp(outputs[j] - most) / sum);
    return outputs[a] - most - std::log(sum);
}

template <class T>
void descend(const Losses<T> &its, const Batch<T> &batch, double step_size, double epsilon) {
    const T tau = its.coefficients[0], beta = its.coefficients[1], clip = its.clip;
    const int64_t n_q = its.qvalues;
    double means[MEANS] = {};
    std::vector<double> by_log_std(its.log_std ? its.policy_outputs : 0);
    for (int64_t b = 0; b < its.batch; b++) {
        const auto output = [&](int64_t network) {
            return its.outputs + (network * its.batch + b) * its.width;
        };
        const auto gradient = [&](int64_t network) {
            return its.gradients + (network * its.batch + b) * its.width;
        };
        const int64_t a = batch.choice ? batch.choice[b] : 0;
        const T c = batch.loss_share[b], v = *output(1), next_v = *output(2 + n_q);
        const T y = batch.reward[b] + (batch.terminated[b] ? 0 : batch.discount[b] * next_v);

        T target_q = std::numeric_limits<T>::infinity(), td_error = 0, loss_q = 0, sum_q = 0;
        for (int64_t i = 0; i < n_q; i++) {
            const T q = output(2 + i)[a], x = q - y;
            T derivative;
            loss_q += distance(its.distance, x, derivative);
            std::fill_n(gradient(2 + i), its.q_outputs, T(0));
            gradient(2 + i)[a] = c * derivative;
            target_q = smaller(target_q, output(3 + n_q + i)[a]);
            td_error = larger(td_error, x * x);
            sum_q += q;
        }
        batch.td_errors[b] = td_error;
        if (batch.share[b] == 0) {  // masked: whatever it is, it counts as 0
            const T zero = 0 * c;   // NaN, if nothing counts
            std::fill_n(gradient(0), its.policy_outputs, zero);
            for (int64_t k = 1; k < 2 + n_q; k++) gradient(k)[k == 1 ? 0 : a] = zero;
            for (const Mean loss : {LOSS_ACTOR, LOSS_QVALUE, LOSS_VALUE}) means[loss] += zero;
            continue;
        }
        const T advantage = target_q - v, asymmetry = advantage < 0 ? 1 - tau : tau;
        *gradient(1) = -2 * c * asymmetry * advantage;
        const T weight = smaller(std::exp(beta * advantage), clip);
        const T log_pi =
            batch.constant[b] +
            (batch.choice
                 ? log_probability(its, output(0), a, -c * weight, gradient(0))
                 : log_density(its, output(0), batch.action + b * its.policy_outputs, -c * weight,
                               gradient(0), by_log_std.data()));

        const double share = batch.share[b], loss_share = c;
        means[LOSS_ACTOR] -= loss_share * (weight * log_pi);
        means[LOSS_QVALUE] += loss_share * loss_q;
        means[LOSS_VALUE] += loss_share * (asymmetry * advantage * advantage);
        means[ADVANTAGE] += share * advantage;
        means[VALUE] += share * v;
        means[QVALUE] += share * (sum_q / n_q);
        means[CLIPPED] += share * (weight >= clip);
        means[ENTROPY] -= share * log_pi;
    }
    std::copy_n(means, MEANS, batch.means);

    constexpr T beta2 = 0.999, rest1 = 1 - 0.9, rest2 = 1 - 0.999;  // as in mlp.cpp
    for (size_t j = 0; j < by_log_std.size(); j++) {
        const T gradient = by_log_std[j];
        T &first = its.first_moment[j], &second = its.second_moment[j];
        first += rest1 * (gradient - first);
        second = beta2 * second + rest2 * gradient * gradient;
        its.log_std[j] -= T(step_size) * first / (std::sqrt(second) + T(epsilon));
    }
}

}  // namespace

#define EXPORT(T)                                                                                  \
    void losses_##T(const Losses<T> *losses, const Batch<T> *batch, double step_size,              \
                    double epsilon) {                                                              \
        descend(*losses, *batch, step_size, epsilon);                                              \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
}
