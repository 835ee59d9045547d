// Forward and backward pass of many small multilayer perceptrons on the threads of a CPU.
//
// Every product is made of tiles: ROWS x COLUMNS sums stay in registers while the tile runs along
// the summed dimension of a left factor, read number by number, and of a panel, COLUMNS columns of
// the right factor. Weights are row-major, since others read them too, and are copied into panels
// that stay in the L1 cache. Hidden activations and their gradients are stored as panels from the
// start, so that the gradients of the weights, products of the two, need no copies.
//
// Each number is summed by one thread, in the order of the summed dimension: neither the number of
// threads nor how they share the work changes a bit of the result.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ROWS = 6;  // 12 of 16
#else
constexpr int VECTOR_BYTES = 16, ROWS = 6;
#endif
template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <class T> constexpr int COLUMNS = 2 * LANES<T>;
constexpr int64_t DEPTH = 256;  // of a packed panel: 16 KB with AVX, half of a common L1 cache
constexpr int64_t BATCH = 384;  // rows that go through all layers together, in the L2 cache

template <class T> struct VectorOf { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vector = typename VectorOf<T>::type;

template <class T> inline Vector<T> load(const T *from) {
    Vector<T> vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class T> inline void store(T *to, Vector<T> vector) {
    std::memcpy(to, &vector, sizeof vector);
}

// A matrix, stored row after row or panel after panel.
template <class T> struct Matrix {
    T *data;
    int64_t row, panel;  // how far it is to the next one

    T *at(int64_t r, int64_t column) const {
        return data + r * row + column / COLUMNS<T> * panel + column % COLUMNS<T>;
    }
    Matrix from(int64_t r, int64_t column) const { return {at(r, column), row, panel}; }
};

template <class T> struct Parameter { T *value, *first_moment, *second_moment, *target; };

template <class T> struct Layer {
    int64_t in, out;                       // multiples of COLUMNS
    Matrix<T> inputs, outputs, gradients;  // [batch, in], [batch, out], of the loss: [batch, out]
    Parameter<T> weights, biases;          // [in, out], [out]
};

template <class T> struct Networks {
    int64_t learning, count, depth, batch;  // those that learn come first
    const Layer<T> *layers;                 // [count, depth]
};

// Calls body(first, size) for about equal parts of a range, none larger than `most`.
template <class Body> inline void split(int64_t length, int64_t most, Body body) {
    const int64_t parts = (length + most - 1) / most;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = length * part / parts;
        body(first, length * (part + 1) / parts - first);
    }
}

// Calls body(network, first, size) for all rows of all networks, an equal share on each thread, in
// few pieces, because the weights are packed once for each.
template <class Body> void share_rows(int64_t networks, int64_t batch, int threads, Body body) {
    const int64_t tiles = (batch + ROWS - 1) / ROWS, total = networks * tiles;
    #pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t end = total * (thread + 1) / team;
        for (int64_t at = total * thread / team, size; at < end; at += size) {
            const int64_t first = at % tiles;
            size = std::min({tiles - first, end - at, BATCH / ROWS});
            body(at / tiles, first * ROWS, std::min(size * ROWS, batch - first * ROWS));
        }
    }
}

template <class T> inline T *scratch() {
    alignas(64) static thread_local T numbers[DEPTH * (COLUMNS<T> + 1)];
    return numbers;
}

template <class T> alignas(64) constexpr T ZEROS[COLUMNS<T>] = {};

// start + left * right for `rows` <= ROWS rows and the first panel of right; finish(row, column,
// sums) receives the vectors of the result. If transposed, left is the transpose of the one given.
template <bool transposed, class T, class Finish, int M = ROWS>
[[gnu::noinline]] void tile(int64_t rows, int64_t depth, Matrix<T> left, Matrix<T> right,
                            const T *start, int64_t start_row, Finish finish) {
    if constexpr (M > 1)
        if (rows < M)
            return tile<transposed, T, Finish, M - 1>(
                rows, depth, left, right, start, start_row, finish);
    const int64_t down = transposed ? 1 : left.row, along = transposed ? left.row : 1;
    const int64_t length = transposed ? depth : COLUMNS<T>;  // until left's next panel
    Vector<T> sums[M][2];
    #pragma GCC unroll 12
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) sums[m][v] = load(start + m * start_row + v * LANES<T>);
    for (; depth > 0; depth -= length, left.data += left.panel) {
        const T *number = left.data;
        for (int64_t k = 0; k < length; k++, number += along, right.data += right.row) {
            const Vector<T> factors[] = {load(right.data), load(right.data + LANES<T>)};
            #pragma GCC unroll 12
            for (int m = 0; m < M; m++)
                for (int v = 0; v < 2; v++) sums[m][v] += number[m * down] * factors[v];
        }
    }
    #pragma GCC unroll 12
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) finish(m, v * LANES<T>, sums[m][v]);
}

// result = finish(row, column, start + left * weights) for some rows of a batch. Left holds the
// inputs of the layer or, where the weights are transposed, its gradients.
template <bool transposed, class T, class Finish>
void multiply(int64_t rows, Matrix<T> left, const Layer<T> &layer,
              const std::type_identity_t<T> *start, Matrix<T> result, Finish finish) {
    constexpr int C = COLUMNS<T>;
    const int64_t length = transposed ? layer.out : layer.in;
    const int64_t down = transposed ? 1 : layer.out, across = transposed ? layer.out : 1;
    T *panel = scratch<T>();
    for (int64_t column = 0; column < (transposed ? layer.in : layer.out); column += C)
        split(length / C, DEPTH / C, [&](int64_t first, int64_t depth) {
            first *= C, depth *= C;
            const T *weights = layer.weights.value + first * down + column * across;
            for (int64_t k = 0; k < depth; k++)
                if constexpr (transposed)
                    for (int n = 0; n < C; n++) panel[k * C + n] = weights[k + n * across];
                else
                    std::memcpy(panel + k * C, weights + k * down, C * sizeof(T));
            const bool last = first + depth == length;
            split(rows, ROWS, [&](int64_t row, int64_t size) {
                // Meanwhile, fetch what is packed next, a line of it for each row of the panel.
                for (int64_t k = depth * row / rows; k < depth * (row + size) / rows; k++)
                    __builtin_prefetch(weights + C * across +
                                       (transposed ? k % C * across + k / C * C : k * down));
                T *sums = result.at(row, column);
                tile<false, T>(size, depth, left.from(row, first), {panel, C, 0},
                               first ? sums : start ? start + column : ZEROS<T>,
                               first ? result.row : 0, [=](int64_t m, int64_t n, Vector<T> sum) {
                                   store(sums + m * result.row + n,
                                         last ? finish(row + m, column + n, sum) : sum);
                               });
            });
        });
}

template <class T> void forward(const Networks<T> &networks, int threads) {
    const auto layers = [&](int64_t network, int64_t first, int64_t rows) {
        const Layer<T> *layer = networks.layers + network * networks.depth;
        for (int64_t l = 1; l <= networks.depth; l++, layer++) {
            const Vector<T> least = Vector<T>{} + T(l < networks.depth ? 0 : -INFINITY);
            const auto activate = [=](int64_t, int64_t, Vector<T> sum) {
                return sum < least ? least : sum;  // NaN remains
            };
            multiply<false>(rows, layer->inputs.from(first, 0), *layer, layer->biases.value,
                            layer->outputs.from(first, 0), activate);
        }
    };
    share_rows(networks.count, networks.batch, threads, layers);
}

// Gradients of the loss with respect to hidden activations.
template <class T> void differentiate(const Networks<T> &networks, int threads) {
    const auto layers = [&](int64_t network, int64_t first, int64_t rows) {
        const Layer<T> *layer = networks.layers + (network + 1) * networks.depth - 1;
        for (int64_t l = networks.depth; l > 1; l--, layer--) {
            const Matrix<T> active = layer->inputs.from(first, 0);
            const auto mask = [=](int64_t row, int64_t column, Vector<T> sum) {
                return load(active.at(row, column)) <= 0 ? Vector<T>{} : sum;
            };
            multiply<true>(rows, layer->gradients.from(first, 0), *layer, nullptr,
                           layer[-1].gradients.from(first, 0), mask);
        }
    };
    share_rows(networks.learning, networks.batch, threads, layers);
}

// A step of Adam, then of the target, with `size` numbers from `at` on.
template <class T>
void descend(Parameter<T> parameter, int64_t at, int64_t size, const T *gradients, T step_size,
             T epsilon, T target_rate) {
    constexpr T beta2 = 0.999, rest1 = 1 - 0.9, rest2 = 1 - 0.999;
    for (const int64_t end = at + size; at < end; at += LANES<T>, gradients += LANES<T>) {
        const Vector<T> gradient = load(gradients);
        Vector<T> first = load(parameter.first_moment + at);
        Vector<T> second = load(parameter.second_moment + at), value = load(parameter.value + at);
        first += rest1 * (gradient - first);
        second = beta2 * second + rest2 * gradient * gradient;
        T roots[LANES<T>];
        store(roots, second);
        for (T &root : roots) root = std::sqrt(root);
        value -= step_size * first / (load(roots) + epsilon);
        store(parameter.first_moment + at, first);
        store(parameter.second_moment + at, second);
        store(parameter.value + at, value);
        if (!parameter.target) continue;
        const Vector<T> target = load(parameter.target + at);
        store(parameter.target + at, target + target_rate * (value - target));
    }
}

// Takes a step with all weights and biases, COLUMNS rows of weights at a time, so that their
// gradients are used before they leave the caches.
template <class T> void update(const Networks<T> &networks, const double *rates, int threads) {
    constexpr int C = COLUMNS<T>;
    const double epsilon = rates[networks.learning], target_rate = rates[networks.learning + 1];
    int64_t inputs = 0;
    for (int64_t l = 0; l < networks.depth; l++) inputs += networks.layers[l].in;
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t at = 0; at < networks.learning * inputs; at += C) {
        const double step_size = rates[at / inputs];
        const Layer<T> *layer = networks.layers + at / inputs * networks.depth;
        int64_t first = at % inputs;
        for (; first >= layer->in; layer++) first -= layer->in;
        const bool has_bias = first == 0;
        T one = 1, *gradients = scratch<T>();
        split(layer->out / C, DEPTH / C, [&](int64_t column, int64_t width) {
            column *= C, width *= C;
            for (int64_t n = 0; n < width; n += C)
                split(networks.batch, DEPTH, [&](int64_t row, int64_t depth) {
                    const auto add = [&](int64_t rows, Matrix<T> left, T *sums) {
                        tile<true>(rows, depth, left, layer->gradients.from(row, column + n),
                                   row ? sums : ZEROS<T>, row ? width : 0,
                                   [=](int64_t m, int64_t v, Vector<T> sum) {
                                       store(sums + m * width + v, sum);
                                   });
                    };
                    split(C, ROWS, [&](int64_t m, int64_t rows) {
                        add(rows, layer->inputs.from(row, first + m), gradients + m * width + n);
                    });
                    if (has_bias) add(1, {&one, 0, 0}, gradients + C * width + n);
                });
            const auto step = [&](Parameter<T> parameter, int64_t start, int64_t m) {
                descend<T>(parameter, start + column, width, gradients + m * width, step_size,
                           epsilon, target_rate);
            };
            for (int64_t m = 0; m < C; m++) step(layer->weights, (first + m) * layer->out, m);
            if (has_bias) step(layer->biases, 0, C);
        });
    }
}

// All gradients with respect to activations come first, because the update changes the weights.
template <class T> void backward(const Networks<T> &networks, const double *rates, int threads) {
    differentiate(networks, threads);
    update(networks, rates, threads);
}

}  // namespace

#define EXPORT(T)                                                                                  \
    int columns_##T() { return COLUMNS<T>; }                                                       \
    void forward_##T(const Networks<T> *networks, int threads) { forward(*networks, threads); }    \
    void backward_##T(const Networks<T> *networks, const double *rates, int threads) {             \
        backward(*networks, rates, threads);                                                       \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
}
