// Transformer blocks over the few positions of a pass of decoding, in one call. See mmtp/nn/native.py, which compiles and calls this.
//
// Every number is computed by the same operations in the same order whatever stands beside it: a position gets the same bits in a pass of
// one and of many, alone and in a batch. So sums run over inputs one by one, in vectors across outputs; what reduces a row does so in the
// fixed lanes of `dot` or `match`; and keys that a mask hides add exact zeros.

#ifdef _OPENMP
#include <omp.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t pair;  // two numbers of bfloat16, the first in the lower half
typedef pair pairs __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static const int LAYOUT = 8;         // raised with whatever native.py or refinement.py has to lay out or pass otherwise; it has the same number
static const int PANEL = 2 * LANES;  // outputs whose weights stand together: [outputs / PANEL, inputs, PANEL]
static const int AHEAD = 16384;      // bytes from what is multiplied by to what is asked for
static const int FAR = 20 << 20;     // bytes of weights from which on caches seldom hold them all

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }

// What the caller lays out; native.py has the same structures.
struct Sizes {
    int64_t width, heads, kv_heads, head_dim, mlp_width;
    int64_t written;           // key heads of the positions themselves: kv_heads, or 0 where queries read what else is held
    int64_t num_banks;         // kinds of keys; 0 where all are alike
    int64_t paired;            // whether weights are pairs
    int64_t rounded;           // whether they multiply pairs as well, their inputs rounded to bfloat16
    const float *exchange;     // [num_banks, num_banks]: what a row of one bank has of each
    const float *frequencies;  // [head_dim / 2], rotary
    const int64_t *axis;       // [head_dim / 2], of three, that each belongs to
    float eps;
};

struct Block {
    const float *embedding_norm, *state_norm;  // of a head's step: u = project [norm(embedded); norm(x)] + added; or null
    const void *project;
    const float *memory_norm;  // keys and values of states that are remembered beforehand; or null
    const void *memory;
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm, *last_norm;  // gains; of q, k and the last null where there is none
    const void *qkv, *out, *gate_up, *down;                                // in panels; qkv of queries alone where none are written
};

struct Window {
    int64_t lanes, rows, extent;  // rows of each lane; keys that the mask speaks of
    int64_t count;                // rows that are computed, of all lanes together
    const int64_t *at;            // [count], where each is among lanes * rows; null where they are all
    const uint8_t *mask;          // [lanes, rows, extent], 1 where a row may look
    const int64_t *positions;     // [lanes, rows, 3]
    const int64_t *starts;        // [lanes], where rows are written
    float *keys, *values;         // of the first block and lane: [.., kv_heads, slots, head_dim]
    int64_t block_stride, lane_stride, head_stride;
    const float *embedded, *added;       // of a head's step: [lanes, rows, width]; or null
    const int64_t *banks, *own;          // [lanes, extent] bank of each key; [lanes, rows] bank of each row; or null
    int64_t remember;      // whether states are to be remembered, and no more
    float *last;           // [lanes, rows, width]: states after the last norm; or null
    float *work;           // as many numbers as `mmtp_work` says
};

// A weight as products read it: in panels of floats, or of pairs, by which rows are multiplied as they are or rounded.
struct Matrix {
    const void *weights;
    int64_t inputs, outputs, paired, rounded;
};

// A layer that refines states (mmtp/models/refiner.py), and what turns them into logits.
struct Refiner {
    int64_t width, hidden;
    const pair *told, *outward;  // panels [2 hidden] of [state, before], and panels [width]
    const pair *tokens[2];       // panels [2 hidden] of the token that a state has read, and of the newest
    float *met[2];               // [ids, 2 hidden], what these make of the tokens
    uint8_t *known[2];           // [ids], of which they have made it
    const float *kind;           // [2, 2 hidden]
    const float *embedding;      // [ids, width]
    const float *last_norm;
    float eps, last_eps;
};

// How a token is chosen: logits times `sharpness` plus noise, among those that the cuts leave. top_k 0, top_p 1 and min_p 0 cut nothing.
struct Choosing {
    float sharpness, top_p, min_p;
    int64_t top_k;
};

// A place that is to be drafted.
struct Place {
    const float *states[2];  // what is left for it, and what guides that; null where nothing is
    int64_t read, chosen;    // the token that they have read before it, and the index of what was chosen there
    const pair *logits;      // panels of the ids that may stand there
    const int64_t *ids;      // [outputs]
    int64_t outputs;
    const float *noise;      // [outputs], or null
    const float *drawn_of;   // [outputs], probabilities of what was chosen; or null
    float *probabilities;    // [outputs], to be written, where the draft is to be a sample of them; or null
    float keep, draw;        // numbers from 0 to below 1 that draw it: whether what was chosen is kept, and what else comes
    float weight;            // of guidance
};

// What is to be drafted of a row.
struct Trail {
    Choosing how;
    const Place *places;
    int64_t count, branches;
    float *before;            // [branches, width]: the state that predicted `newest`; comes to be the last place's
    int64_t newest, second;   // the last token, and the one before it
    int64_t *drafts;          // [count], to be written
};

static inline int64_t place_of(const Window &w, int64_t r) { return w.at ? w.at[r] : r; }

static inline float dot(const float *a, const float *b, int64_t n) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float total = 0;
    for (int j = 0; j < LANES; j++) total += sum[j];
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

static inline void norm(const float *x, const float *gain, float *out, int64_t n, float eps) {
    const float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * gain[i];
}

// e^x to about one unit in the last place: 2^k times a polynomial (Cephes). What is below the least normal number is 0.
static inline vec exponential(vec x) {
    const ints low = x < -87.0f;
    x = low ? vec{} : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const vec shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    const vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ints power;
    memcpy(&power, &shifted, sizeof power);
    power = (power - 0x4B400000 + 127) << 23;
    vec scale;
    memcpy(&scale, &power, sizeof scale);
    return low ? vec{} : p * scale;
}

// Numbers rounded to bfloat16, two together; weights so: [outputs / PANEL, inputs / 2, PANEL, 2].

static inline uint32_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline void pack(const float *x, int64_t n, pair *to) {
    for (int64_t i = 0; i < n / 2; i++) to[i] = rounded(x[2 * i]) | rounded(x[2 * i + 1]) << 16;
    if (n % 2) to[n / 2] = rounded(x[n - 1]);
}

// sum + one of a pair times one of the other + both others' product.
static inline vec add_products(vec sum, const pair *weights, pair x) {
    const pairs w = *(const pairs *)weights;
#ifdef __AVX512BF16__
    __m512bh own, given;
    const __m512i all = _mm512_set1_epi32((int)x);
    memcpy(&own, &w, sizeof own);
    memcpy(&given, &all, sizeof given);
    const __m512 more = _mm512_dpbf16_ps((__m512)sum, own, given);
    return (vec)more;
#else
    const pairs low = w << 16, high = w & 0xffff0000u;
    const pair first = x << 16, second = x & 0xffff0000u;
    vec one, other;
    float factor, another;
    memcpy(&one, &low, sizeof one);
    memcpy(&other, &high, sizeof other);
    memcpy(&factor, &first, sizeof factor);
    memcpy(&another, &second, sizeof another);
    return sum + one * factor + other * another;
#endif
}

// Asks for what is to be multiplied by in a while. Processors foresee by themselves what comes next of some streams that are read as fast as
// they come, but not far enough where each number of one panel is multiplied with several rows.
template <int C>
static inline void fetch_ahead(const void *at) {
    if constexpr (C == 1)
        for (int byte = 0; byte < 4 * PANEL; byte += 64) __builtin_prefetch((const char *)at + AHEAD + byte);
}

// Products of R rows with C panels: of each row all panels, of each panel two vectors.
template <int R, int C>
static void tile(const float *x, int64_t stride, const float *w, int64_t inputs, vec *out) {
    vec sum[R][2 * C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2 * C; c++) sum[r][c] = vec{};
    for (int64_t i = 0; i < inputs; i++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const float *at = w + (c * inputs + i) * PANEL;
            const vec one = load(at), other = load(at + LANES);
            fetch_ahead<C>(at);
#pragma GCC unroll 13
            for (int r = 0; r < R; r++) {
                const float factor = x[r * stride + i];
                sum[r][2 * c] += one * factor;
                sum[r][2 * c + 1] += other * factor;
            }
        }
    memcpy(out, sum, sizeof sum);
}

// The same by weights that bfloat16 can hold, those of two inputs together: half as much to read, and the same sums.
template <int R, int C>
static void tile(const float *x, int64_t stride, const pair *w, int64_t inputs, vec *out) {
    const int64_t length = (inputs + 1) / 2;
    vec sum[R][2 * C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2 * C; c++) sum[r][c] = vec{};
    auto add = [&](int64_t i, bool two) {
        vec one[2 * C], other[2 * C];
        fetch_ahead<C>(w + i * PANEL);
#pragma GCC unroll 8
        for (int c = 0; c < 2 * C; c++) {
            const pairs both = *(const pairs *)(w + (c / 2 * length + i) * PANEL + c % 2 * LANES), low = both << 16, high = both & 0xffff0000u;
            memcpy(&one[c], &low, sizeof low);
            memcpy(&other[c], &high, sizeof high);
        }
#pragma GCC unroll 13
        for (int r = 0; r < R; r++) {
            const float factor = x[r * stride + 2 * i], second = two ? x[r * stride + 2 * i + 1] : 0;
#pragma GCC unroll 8
            for (int c = 0; c < 2 * C; c++) {
                sum[r][c] += one[c] * factor;
                if (two) sum[r][c] += other[c] * second;
            }
        }
    };
    for (int64_t i = 0; i < inputs / 2; i++) add(i, true);
    if (inputs % 2) add(length - 1, false);
    memcpy(out, sum, sizeof sum);
}

// And the same of rows that are rounded as well: two products at a time.
template <int R, int C>
static void tile(const pair *x, int64_t stride, const pair *w, int64_t inputs, vec *out) {
    const int64_t length = (inputs + 1) / 2;
    vec sum[R][2 * C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2 * C; c++) sum[r][c] = vec{};
    for (int64_t i = 0; i < length; i++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const pair *at = w + (c * length + i) * PANEL;
            fetch_ahead<C>(at);
#pragma GCC unroll 13
            for (int r = 0; r < R; r++) {
                sum[r][2 * c] = add_products(sum[r][2 * c], at, x[r * stride + i]);
                sum[r][2 * c + 1] = add_products(sum[r][2 * c + 1], at + LANES, x[r * stride + i]);
            }
        }
    memcpy(out, sum, sizeof sum);
}

static inline const float *panel_of(const float *w, int64_t panel, int64_t inputs) { return w + panel * inputs * PANEL; }
static inline const pair *panel_of(const pair *w, int64_t panel, int64_t inputs) { return w + panel * ((inputs + 1) / 2) * PANEL; }

// As many rows at a time as sums fit in registers beside a row's factor and the weights: of C panels.
template <int C>
constexpr int most_rows() { return (LANES == 16 ? 26 : 12) / (2 * C); }

// A tile of `rows` rows, R at most.
template <int R, int C, class X, class W>
static inline void tile_of(int64_t rows, const X *x, int64_t stride, const W *w, int64_t inputs, vec *out) {
    if (rows == R) return tile<R, C>(x, stride, w, inputs, out);
    if constexpr (R > 1) tile_of<R - 1, C>(rows, x, stride, w, inputs, out);
}

// Any number of rows, some panels of a product: in tiles of about equal height, that none is left with a row or two, whose sums would
// wait for each other. `put(row, panel, ..)`.
template <int C, class X, class W, class Put>
static inline void product(const X *x, int64_t rows, int64_t stride, const W *w, int64_t inputs, int64_t panel, Put put) {
    const W *at = panel_of(w, panel, inputs);
    vec sums[most_rows<C>() * 2 * C];
    for (int64_t r = 0, tiles = (rows + most_rows<C>() - 1) / most_rows<C>(); tiles; tiles--) {
        const int64_t high = (rows - r + tiles - 1) / tiles;
        tile_of<most_rows<C>(), C>(high, x + r * stride, stride, at, inputs, sums);
        for (int64_t i = 0; i < high * C; i++) put(r + i / C, panel + i % C, sums[2 * i], sums[2 * i + 1]);
        r += high;
    }
}

static inline bool comes_from_far(int64_t numbers, bool paired) { return numbers * (paired ? 2 : 4) > FAR; }

// Panels at a time: the fewer rows, the more, so that there are sums enough to go on with while one waits for the last; of pairs, from which
// numbers have to be taken apart, with some rows as well. What comes from far away is read as one stream, ahead of time.
static inline int panels_at_once(int64_t rows, const float *, bool) { return rows == 1 ? 4 : 1; }
static inline int panels_at_once(int64_t rows, const pair *, bool far) { return far ? 1 : rows == 1 ? 4 : rows <= 4 ? 2 : 1; }

// All outputs of a product, divided among the threads of the team.
template <class X, class W, class Put>
static inline void linear(const X *x, int64_t rows, int64_t stride, const W *w, int64_t inputs, int64_t outputs, bool far, Put put) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL, wide = panels_at_once(rows, w, far), blocks = panels / wide;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < blocks; b++) {
        if (wide == 4) product<4>(x, rows, stride, w, inputs, 4 * b, put);
        else if (wide == 2) product<2>(x, rows, stride, w, inputs, 2 * b, put);
        else product<1>(x, rows, stride, w, inputs, b, put);
    }
#pragma omp for schedule(static)
    for (int64_t p = blocks * wide; p < panels; p++) product<1>(x, rows, stride, w, inputs, p, put);
}

// Writes or adds what of two vectors lies within a row.
template <bool ADD>
static inline void put_row(float *row, int64_t outputs, int64_t panel, vec one, vec other) {
    float *at = row + panel * PANEL;
    if ((panel + 1) * PANEL <= outputs) {
        store(at, ADD ? load(at) + one : one);
        store(at + LANES, ADD ? load(at + LANES) + other : other);
        return;
    }
    for (int64_t i = 0; i < outputs - panel * PANEL; i++) {
        const float value = i < LANES ? one[i] : other[i - LANES];
        at[i] = ADD ? at[i] + value : value;
    }
}

template <int C, class Put>
static inline void narrow_tile(const pair *x, const pair *w, int64_t length, int64_t panel, Put put) {
    vec sum[2 * C];
    for (int c = 0; c < 2 * C; c++) sum[c] = vec{};
    w += panel * length * PANEL;
    for (int64_t i = 0; i < length; i++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const pair *at = w + (c * length + i) * PANEL;
            sum[2 * c] = add_products(sum[2 * c], at, x[i]);
            sum[2 * c + 1] = add_products(sum[2 * c + 1], at + LANES, x[i]);
        }
    for (int c = 0; c < C; c++) put(panel + c, sum[2 * c], sum[2 * c + 1]);
}

// All outputs of one row. `x` is packed.
template <class Put>
static inline void narrow(const pair *x, const pair *w, int64_t inputs, int64_t outputs, Put put) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL, length = (inputs + 1) / 2;
    int64_t p = 0;
    for (; p + 4 <= panels; p += 4) narrow_tile<4>(x, w, length, p, put);
    for (; p < panels; p++) narrow_tile<1>(x, w, length, p, put);
}

// Norm and rotary position of one query or key, in place.
static inline void place(float *head, const float *gain, const float *cos, const float *sin, int64_t n, float eps) {
    if (gain) norm(head, gain, head, n, eps);
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i] + low * sin[i];
    }
}

static inline float highest(const float *x, int64_t n) {
    vec most = vec{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec each = load(x + i);
        most = each > most ? each : most;
    }
    float top = -INFINITY;
    for (int j = 0; j < LANES; j++) top = most[j] > top ? most[j] : top;
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// Softmax over scores, in place; those of -inf become 0.
static inline void softmax(float *scores, int64_t count, float factor) {
    const float most = highest(scores, count);
    vec sums = {};
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) {
        const vec e = exponential(load(scores + t) - most);
        store(scores + t, e);
        sums += e;
    }
    if (t < count) {
        vec rest = sums * 0 - INFINITY;
        for (int64_t i = t; i < count; i++) rest[i - t] = scores[i];
        rest = exponential(rest - most);
        for (int64_t i = t; i < count; i++) scores[i] = rest[i - t];
        sums += rest;
    }
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += sums[j];
    const float scale = factor / sum;
    for (int64_t i = 0; i < count; i++) scores[i] *= scale;
}

// A softmax of its own for every bank, each with its weight; what an empty bank gives is 0.
static inline void softmaxes(float *scores, float *one, int64_t count, const int64_t *banks, int64_t num_banks, const float *weights) {
    for (int64_t bank = 0; bank < num_banks; bank++) {
        bool some = false;
        for (int64_t t = 0; t < count; t++) {
            const bool in = banks[t] == bank && scores[t] > -INFINITY;
            one[t] = in ? scores[t] : -INFINITY;
            some |= in;
        }
        if (some) softmax(one, count, weights[bank]);
        for (int64_t t = 0; t < count; t++)
            if (banks[t] == bank) one[count + t] = some && scores[t] > -INFINITY ? one[t] : 0;
    }
    memcpy(scores, one + count, count * sizeof *scores);
}

// Of two vectors, sums of lanes that lie STEP apart: of the first where a lane's number lacks that bit, of the other where it has it.
template <int STEP, int... L>
static inline vec joined(vec a, vec b, std::integer_sequence<int, L...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (L & STEP ? LANES + L : L)...) +
           __builtin_shufflevector(a, b, (L & STEP ? LANES + (L ^ STEP) : L ^ STEP)...);
#else
    const ints own = {(L & STEP ? LANES + L : L)...}, other = {(L & STEP ? LANES + (L ^ STEP) : L ^ STEP)...};
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// The sum of each of LANES vectors, in its lane.
template <int STEP = LANES / 2>
static inline vec sums(vec *each) {
#pragma GCC unroll 16
    for (int j = 0; j < STEP; j++) each[j] = joined<STEP>(each[j], each[j + STEP], std::make_integer_sequence<int, LANES>{});
    if constexpr (STEP > 1) return sums<STEP / 2>(each);
    return each[0];
}

// Products of a query with as many keys as there are lanes; with the last of fewer in place of those that are missing.
template <bool MISSING>
static inline vec match(const float *query, const float *keys, int64_t hd, int64_t count) {
    auto key = [&](int64_t j) { return keys + (MISSING && j >= count ? count - 1 : j) * hd; };
    vec each[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) each[j] = vec{};
    int64_t i = 0;
    for (; i + LANES <= hd; i += LANES) {
        const vec q = load(query + i);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) each[j] += q * load(key(j) + i);
    }
    if (i < hd)
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) {
            vec rest = {};
            for (int64_t k = i; k < hd; k++) rest[k - i] = query[k] * key(j)[k];
            each[j] += rest;
        }
    return sums(each);
}

// What G queries read of C vectors of the values, each key in turn. Scores of a query stand `stride` behind those of the one before it, and
// what it reads `hd`.
template <int G, int C>
static inline void gather(const float *scores, int64_t stride, const float *values, int64_t count, int64_t hd, float *read) {
    vec sum[G][C];
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) sum[g][c] = vec{};
    for (int64_t t = 0; t < count; t++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const vec value = load(values + t * hd + c * LANES);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) sum[g][c] += value * scores[g * stride + t];
        }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) store(read + g * hd + c * LANES, sum[g][c]);
}

template <int G>
static inline void read_values(const float *scores, int64_t stride, const float *values, int64_t count, int64_t hd, float *read) {
    constexpr int wide = LANES == 16 ? 4 : 2;
    int64_t i = 0;
    for (; i + wide * LANES <= hd; i += wide * LANES) gather<G, wide>(scores, stride, values + i, count, hd, read + i);
    for (; i + 2 * LANES <= hd; i += 2 * LANES) gather<G, 2>(scores, stride, values + i, count, hd, read + i);
    for (; i + LANES <= hd; i += LANES) gather<G, 1>(scores, stride, values + i, count, hd, read + i);
    for (; i < hd; i++)
        for (int g = 0; g < G; g++) {
            float sum = 0;
            for (int64_t t = 0; t < count; t++) sum += values[t * hd + i] * scores[g * stride + t];
            read[g * hd + i] = sum;
        }
}

// What the queries of a row read that share a key head. `scores` is room for those of each, and twice as much.
static inline void attend(const Sizes &z, const Window &w, int64_t at, int64_t kv, const float *query, float *out, const float *keys,
                          const float *values, float *scores) {
    const int64_t hd = z.head_dim, groups = z.heads / z.kv_heads, lane = at / w.rows;
    const uint8_t *mask = w.mask + at * w.extent;
    const float *key = keys + lane * w.lane_stride + kv * w.head_stride, *value = values + lane * w.lane_stride + kv * w.head_stride;
    int64_t count = w.extent;
    while (count > 1 && !mask[count - 1]) count--;
    const float factor = 1 / sqrtf((float)hd);
    float *room = scores + groups * w.extent;
    query += kv * groups * hd;
    out += kv * groups * hd;
    for (int64_t g = 0; g < groups; g++) {
        float *own = scores + g * w.extent;
        for (int64_t t = 0; t < count; t += LANES) {
            const int64_t there = count - t;
            const float *q = query + g * hd, *k = key + t * hd;
            const vec found = (there < LANES ? match<true>(q, k, hd, there) : match<false>(q, k, hd, there)) * factor;
            if (there >= LANES && !memchr(mask + t, 0, LANES)) store(own + t, found);
            else
                for (int64_t j = 0; j < there && j < LANES; j++) own[t + j] = mask[t + j] ? found[j] : -INFINITY;
        }
        if (z.num_banks) softmaxes(own, room, count, w.banks + lane * w.extent, z.num_banks, z.exchange + w.own[at] * z.num_banks);
        else softmax(own, count, 1);
    }
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) read_values<4>(scores + g * w.extent, w.extent, value, count, hd, out + g * hd);
    for (; g + 3 <= groups; g += 3) read_values<3>(scores + g * w.extent, w.extent, value, count, hd, out + g * hd);
    for (; g + 2 <= groups; g += 2) read_values<2>(scores + g * w.extent, w.extent, value, count, hd, out + g * hd);
    for (; g < groups; g++) read_values<1>(scores + g * w.extent, w.extent, value, count, hd, out + g * hd);
}

// Of unit root mean square.
static inline void unit(const float *x, float *out, int64_t n, float eps) {
    const float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale;
}

// What a refiner makes of a token in one of its two roles, the first time that it is met. Threads that meet it at once write the same.
static inline const float *met(const Refiner &z, int role, int64_t token, float *room, pair *packed) {
    float *made = z.met[role] + token * 2 * z.hidden;
    if (!__atomic_load_n(z.known[role] + token, __ATOMIC_ACQUIRE)) {
        unit(z.embedding + token * z.width, room, z.width, z.eps);
        pack(room, z.width, packed);
        narrow(packed, z.tokens[role], z.width, 2 * z.hidden, [&](int64_t panel, vec one, vec other) {
            put_row<false>(made, 2 * z.hidden, panel, one, other);
        });
        __atomic_store_n(z.known[role] + token, 1, __ATOMIC_RELEASE);
    }
    return made;
}

static inline int64_t greatest(const float *x, int64_t n) {
    const float top = highest(x, n);
    int64_t i = 0;
    for (; i < n - 1 && x[i] < top; i++) {}
    return i;
}

// Numbers that are in the order of floats; the other way round as well.
static inline int32_t order(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// The least logit that the cuts leave: of ids above it there may be so many, of so much probability, and the first not too much more
// probable. `chances` is room for as many numbers as there are logits.
static inline float least_left(const Choosing &how, const float *logits, int64_t n, float *chances) {
    const float most = logits[greatest(logits, n)];
    float lowest = most, all = 0;
    for (int64_t i = 0; i < n; i++) lowest = logits[i] < lowest ? logits[i] : lowest;
    if (how.top_p < 1)
        for (int64_t i = 0; i < n; i++) all += chances[i] = expf((logits[i] - most) * how.sharpness);
    auto leaves = [&](float least) {
        if (how.min_p > 0 && (least - most) * how.sharpness < logf(how.min_p)) return false;
        int64_t above = 0;
        float chance = 0;
        for (int64_t i = 0; i < n; i++) above += logits[i] > least;
        if (how.top_p < 1)
            for (int64_t i = 0; i < n; i++) chance += logits[i] > least ? chances[i] : 0;
        return (!how.top_k || above < how.top_k) && (how.top_p >= 1 || chance < how.top_p * all);
    };
    int32_t low, high;
    memcpy(&low, &lowest, sizeof low);
    memcpy(&high, &most, sizeof high);
    int64_t left = order(high), out = (int64_t)order(low) - 1;
    while (left - out > 1) {
        const int64_t middle = (left + out) >> 1;
        const int32_t bits = order((int32_t)middle);
        float least;
        memcpy(&least, &bits, sizeof least);
        if (leaves(least)) left = middle;
        else out = middle;
    }
    const int32_t bits = order((int32_t)left);
    float least;
    memcpy(&least, &bits, sizeof least);
    return least;
}

// A sample of probabilities; what was drawn before, of `of` or as the only one that could have come, is kept as often as can be: where
// `keep`, from 0 to below 1, is below the ratio of both. Else `draw` tells which of what these have beyond those.
static inline int64_t redrawn(const float *p, int64_t n, int64_t drawn, const float *of, double keep, double draw) {
    if (drawn >= 0 && keep * (of ? of[drawn] : 1) < p[drawn]) return drawn;
    // All of them where rounding leaves nothing: there both are the same.
    for (int beyond = drawn >= 0; beyond >= 0; beyond--) {
        auto weight = [&](int64_t i) -> double {
            const float less = !beyond ? 0 : of ? of[i] : i == drawn ? p[i] : 0;
            return p[i] > less ? p[i] - less : 0;
        };
        double sum = 0, reached = 0;
        for (int64_t i = 0; i < n; i++) sum += weight(i);
        if (sum == 0) continue;
        int64_t last = 0;
        for (int64_t i = 0; i < n; i++) {
            const double each = weight(i);
            if (each > 0) last = i;
            reached += each;
            if (reached > draw * sum) return i;
        }
        return last;
    }
    return drawn;
}

// A token by its logits: the greatest score, or a sample of probabilities, which are kept. `scores` is room.
static inline int64_t choose(const Choosing &how, const Place &p, const float *logits, float *scores) {
    const int64_t n = p.outputs;
    const float least = how.top_k || how.top_p < 1 || how.min_p > 0 ? least_left(how, logits, n, scores) : -INFINITY;
    if (p.probabilities) scores = p.probabilities;
    for (int64_t i = 0; i < n; i++)
        scores[i] = logits[i] < least ? -INFINITY : logits[i] * how.sharpness + (p.noise ? p.noise[i] : 0);
    if (!p.probabilities) return greatest(scores, n);
    softmax(scores, n, 1);
    return redrawn(scores, n, p.drawn_of ? p.chosen : -1, p.drawn_of, p.keep, p.draw);
}

// Logits of one that knows less guide others: u + w (c - u).
static inline void guide(float *logits, const float *unconditional, float weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) logits[i] = unconditional[i] + weight * (logits[i] - unconditional[i]);
}

// Drafts of a row's places in turn.
static inline void refine(const Refiner &z, const Trail &t, float *work) {
    const int64_t d = z.width, wide = 2 * z.hidden, branches = t.branches;
    int64_t newest = t.newest, second = t.second;
    float *told = work, *up = told + 2 * d, *normed = up + wide, *logits = normed + d;
    for (int64_t k = 0; k < t.count; k++) {
        const Place &p = t.places[k];
        const bool left = p.states[0];
        int64_t draft = p.chosen;  // as index, at first
        if (left && p.read == newest) {
            for (int64_t b = 0; b < branches; b++) memcpy(t.before + b * d, p.states[b], d * sizeof *work);
        } else {
            float *unconditional = logits + p.outputs;
            pair *packed = (pair *)(unconditional + p.outputs);
            const float *kind = z.kind + left * wide;
            const float *read = met(z, 0, left ? p.read : second, told, packed), *token = met(z, 1, newest, told, packed);
            for (int64_t b = 0; b < branches; b++) {
                float *own = t.before + b * d;
                const float *from = left ? p.states[b] : own;
                unit(from, told, d, z.eps);
                unit(own, told + d, d, z.eps);
                pack(told, 2 * d, packed);
                for (int64_t i = 0; i < wide; i++) up[i] = kind[i] + read[i] + token[i];
                narrow(packed, z.told, 2 * d, wide, [&](int64_t panel, vec one, vec other) { put_row<true>(up, wide, panel, one, other); });
                int64_t i = 0;
                for (; i + LANES <= z.hidden; i += LANES) {
                    const vec gate = load(up + i);
                    store(up + i, gate / (1 + exponential(-gate)) * load(up + z.hidden + i));
                }
                for (; i < z.hidden; i++) up[i] = up[i] / (1 + expf(-up[i])) * up[z.hidden + i];
                pack(up, z.hidden, packed);
                memmove(own, from, d * sizeof *own);
                narrow(packed, z.outward, z.hidden, d, [&](int64_t panel, vec one, vec other) { put_row<true>(own, d, panel, one, other); });
                norm(own, z.last_norm, normed, d, z.last_eps);
                pack(normed, d, packed);
                float *to = b ? unconditional : logits;
                narrow(packed, p.logits, d, p.outputs, [&](int64_t panel, vec one, vec other) {
                    put_row<false>(to, p.outputs, panel, one, other);
                });
            }
            if (branches > 1) guide(logits, unconditional, p.weight, p.outputs);
            draft = choose(t.how, p, logits, unconditional);
        }
        draft = p.ids[draft];
        t.drafts[k] = draft;
        second = newest;
        newest = draft;
    }
}

// Rows as products read them: as they are, or rounded, in `room`, by all threads of the team together. And how far they lie apart.
static inline int64_t length_of(int64_t inputs, const float *) { return inputs; }
static inline int64_t length_of(int64_t inputs, const pair *) { return (inputs + 1) / 2; }
static inline const float *inputs_of(const float *rows, int64_t, int64_t, const float *) { return rows; }
static inline const pair *inputs_of(const float *rows, int64_t count, int64_t inputs, pair *room) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; r++) pack(rows + r * inputs, inputs, room + r * length_of(inputs, room));
    return room;
}

// [rows, outputs] by all threads of the team together; `room` has space for rounded rows.
static inline void multiply(const Matrix &matrix, const float *x, int64_t rows, float *y, void *room) {
    const int64_t inputs = matrix.inputs, outputs = matrix.outputs;
    const bool far = comes_from_far(inputs * outputs, matrix.paired);
    const auto put = [&](int64_t r, int64_t p, vec one, vec other) { put_row<false>(y + r * outputs, outputs, p, one, other); };
    const pair *pairs = (const pair *)matrix.weights;
    if (matrix.rounded) linear(inputs_of(x, rows, inputs, (pair *)room), rows, (inputs + 1) / 2, pairs, inputs, outputs, far, put);
    else if (matrix.paired) linear(x, rows, inputs, pairs, inputs, outputs, far, put);
    else linear(x, rows, inputs, (const float *)matrix.weights, inputs, outputs, far, put);
}

// Numbers that a row of a product has at most, where it is rounded.
static inline int64_t widest(const Sizes &z) {
    const int64_t read = z.heads * z.head_dim, most = read > z.mlp_width ? read : z.mlp_width;
    return z.rounded ? ((most > 2 * z.width ? most : 2 * z.width) + 1) / 2 : 0;
}

// Blocks one after the other; `x` [lanes * rows, width] is changed in place, where rows are computed. Between the two everything stands
// without gaps, row r being the one at `place_of(w, r)`.
template <class X, class W>
static inline void run_blocks(const Sizes *sizes, const Block *blocks, int64_t count, const Window *window, float *x, int64_t threads) {
    const Sizes &z = *sizes;
    const Window &w = *window;
    const int64_t d = z.width, hd = z.head_dim, n = w.count, half = (z.mlp_width + PANEL - 1) / PANEL;
    const int64_t heads = z.heads + 2 * z.written, wide = heads * hd, read_wide = z.heads * hd, held_wide = 2 * z.kv_heads * hd;
    const bool far = comes_from_far(count * d * (wide + read_wide + 3 * z.mlp_width), z.paired);
    float *normed = w.work, *joined = normed + 2 * n * d, *read = joined + n * (read_wide + held_wide), *hidden = read + n * read_wide;
    float *cos = hidden + n * z.mlp_width, *sin = cos + n * hd / 2, *narrowed = sin + n * hd / 2, *scores = narrowed + n * widest(z);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto read_by_products = [&](const float *rows, int64_t inputs) { return inputs_of(rows, n, inputs, (X *)narrowed); };
        const auto multiply = [&](const float *rows, int64_t inputs, const void *weight, int64_t outputs, auto put) {
            const X *read = read_by_products(rows, inputs);
            linear(read, n, length_of(inputs, read), (const W *)weight, inputs, outputs, far, put);
        };
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *own = scores + (z.heads / z.kv_heads + 2) * thread * w.extent;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * hd / 2; i++) {
            const float angle = (float)w.positions[place_of(w, i / (hd / 2)) * 3 + z.axis[i % (hd / 2)]] * z.frequencies[i % (hd / 2)];
            cos[i] = cosf(angle);
            sin[i] = sinf(angle);
        }
        for (int64_t b = 0; b < count; b++) {
            const Block &block = blocks[b];
            float *keys = w.keys + b * w.block_stride, *values = w.values + b * w.block_stride;
            // A query, key or value that a product has given: to its place, and into the cache.
            auto settle = [&](float *head, int64_t r, bool query, bool value, int64_t kv) {
                if (!value) place(head, query ? block.q_norm : block.k_norm, cos + r * hd / 2, sin + r * hd / 2, hd, z.eps);
                if (query) return;
                const int64_t at = place_of(w, r), lane = at / w.rows, slot = w.starts[lane] + at % w.rows;
                memcpy((value ? values : keys) + lane * w.lane_stride + kv * w.head_stride + slot * hd, head, hd * sizeof *head);
            };
            if (w.remember) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < n; r++) norm(x + place_of(w, r) * d, block.memory_norm, normed + r * d, d, z.eps);
                multiply(normed, d, block.memory, held_wide, [&](int64_t r, int64_t p, vec one, vec other) {
                    put_row<false>(joined + r * held_wide, held_wide, p, one, other);
                });
#pragma omp for schedule(static)
                for (int64_t i = 0; i < n * 2 * z.kv_heads; i++) {
                    const int64_t r = i / (2 * z.kv_heads), h = i % (2 * z.kv_heads);
                    settle(joined + i * hd, r, false, h >= z.kv_heads, h % z.kv_heads);
                }
                continue;
            }
            if (block.project) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < n; r++) {
                    const int64_t at = place_of(w, r) * d;
                    norm(w.embedded + at, block.embedding_norm, normed + 2 * r * d, d, z.eps);
                    norm(x + at, block.state_norm, normed + (2 * r + 1) * d, d, z.eps);
                    if (w.added) memcpy(x + at, w.added + at, d * sizeof *x);
                    else memset(x + at, 0, d * sizeof *x);
                }
                multiply(normed, 2 * d, block.project, d, [&](int64_t r, int64_t p, vec one, vec other) {
                    put_row<true>(x + place_of(w, r) * d, d, p, one, other);
                });
            }
#pragma omp for schedule(static)
            for (int64_t r = 0; r < n; r++) norm(x + place_of(w, r) * d, block.attention_norm, normed + r * d, d, z.eps);
            multiply(normed, d, block.qkv, wide, [&](int64_t r, int64_t p, vec one, vec other) {
                put_row<false>(joined + r * wide, wide, p, one, other);
            });
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n * heads; i++) {
                const int64_t h = i % heads;
                settle(joined + i * hd, i / heads, h < z.heads, h >= z.heads + z.written, (h - z.heads) % z.kv_heads);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n * z.kv_heads; i++) {
                const int64_t r = i / z.kv_heads;
                attend(z, w, place_of(w, r), i % z.kv_heads, joined + r * wide, read + r * read_wide, keys, values, own);
            }
            multiply(read, read_wide, block.out, d, [&](int64_t r, int64_t p, vec one, vec other) {
                put_row<true>(x + place_of(w, r) * d, d, p, one, other);
            });
#pragma omp for schedule(static)
            for (int64_t r = 0; r < n; r++) norm(x + place_of(w, r) * d, block.mlp_norm, normed + r * d, d, z.eps);
            // Panels of the gate and of what it lets through take turns.
            const X *gated = read_by_products(normed, d);
            const W *gate_up = (const W *)block.gate_up;
#pragma omp for schedule(static)
            for (int64_t p = 0; p < half; p++) {
                const auto put = [&](int64_t r, int64_t panel, vec one, vec other) {
                    float *row = hidden + r * z.mlp_width;
                    if (panel % 2 == 0) {
                        put_row<false>(row, z.mlp_width, p, one / (1 + exponential(-one)), other / (1 + exponential(-other)));
                        return;
                    }
                    float *at = row + p * PANEL;
                    if ((p + 1) * PANEL <= z.mlp_width) {
                        store(at, load(at) * one);
                        store(at + LANES, load(at + LANES) * other);
                        return;
                    }
                    for (int64_t j = 0; p * PANEL + j < z.mlp_width; j++) at[j] *= j < LANES ? one[j] : other[j - LANES];
                };
                const int64_t apart = length_of(d, gated);
                if (panels_at_once(n, gate_up, far) > 1) {
                    product<2>(gated, n, apart, gate_up, d, 2 * p, put);
                } else {
                    product<1>(gated, n, apart, gate_up, d, 2 * p, put);
                    product<1>(gated, n, apart, gate_up, d, 2 * p + 1, put);
                }
            }
            multiply(hidden, z.mlp_width, block.down, d, [&](int64_t r, int64_t p, vec one, vec other) {
                put_row<true>(x + place_of(w, r) * d, d, p, one, other);
            });
        }
        if (w.last) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < n; r++) norm(x + place_of(w, r) * d, blocks[count - 1].last_norm, w.last + place_of(w, r) * d, d, z.eps);
        }
    }
}

extern "C" {

// Sizes tell of most changes by themselves.
int64_t mmtp_layout(void) { return ((LAYOUT * 1000 + (int64_t)sizeof(Sizes)) * 1000 + sizeof(Block)) * 1000 + sizeof(Window); }

int64_t mmtp_refine_layout(void) { return ((int64_t)sizeof(Refiner) * 1000 + sizeof(Place)) * 1000 + sizeof(Trail); }

int64_t mmtp_panel(void) { return PANEL; }

// Numbers of room that a pass needs.
int64_t mmtp_work(const Sizes *sizes, int64_t rows, int64_t extent, int64_t threads) {
    const Sizes &z = *sizes;
    const int64_t joined = (z.heads + 2 * z.kv_heads) * z.head_dim;
    return rows * (2 * z.width + joined + z.heads * z.head_dim + z.mlp_width + z.head_dim + widest(z)) + (z.heads / z.kv_heads + 2) * threads * extent;
}

void mmtp_linear(const Matrix *matrix, const float *x, int64_t rows, float *y, void *room, int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(*matrix, x, rows, y, room);
}

// The token of each of `count` rows: of the greatest logit, or of a sample. Logits are of states after the norm; where `guide` has an index,
// that of a row behind those, they are guided by its logits. `room` has space for `rows` states, as many logits, and again for the longer.
void mmtp_pick(const Matrix *matrix, const float *const *states, int64_t rows, int64_t count, const float *gain, float eps,
               const int64_t *guides, const float *weights, const Choosing *how, const float *const *noise, int64_t *tokens, float *room,
               int64_t threads) {
    const int64_t n = matrix->outputs;
    float *normed = room, *logits = normed + rows * matrix->inputs, *scores = logits + rows * n;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) norm(states[r], gain, normed + r * matrix->inputs, matrix->inputs, eps);
        multiply(*matrix, normed, rows, logits, scores);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; r++) {
            Place place = {};
            place.outputs = n;
            place.noise = noise[r];
            float *own = logits + r * n;
            if (guides[r] >= 0) guide(own, logits + guides[r] * n, weights[r], n);
            tokens[r] = choose(how[r], place, own, scores + r * n);
        }
    }
}

void mmtp_blocks(const Sizes *sizes, const Block *blocks, int64_t count, const Window *window, float *x, int64_t threads) {
    if (sizes->rounded) run_blocks<pair, pair>(sizes, blocks, count, window, x, threads);
    else if (sizes->paired) run_blocks<float, pair>(sizes, blocks, count, window, x, threads);
    else run_blocks<float, float>(sizes, blocks, count, window, x, threads);
}

// Samples of rows of scores, [rows, outputs], which become their probabilities. `drawn` [rows] is what was drawn before, -1 for nothing, of
// `of` [rows]; `numbers` [rows, 2].
void mmtp_redraw(float *scores, int64_t rows, int64_t outputs, const int64_t *drawn, const float *const *of, const double *numbers,
                 int64_t *tokens) {
    for (int64_t r = 0; r < rows; r++) {
        softmax(scores + r * outputs, outputs, 1);
        tokens[r] = redrawn(scores + r * outputs, outputs, drawn[r], of[r], numbers[2 * r], numbers[2 * r + 1]);
    }
}

// Drafts of rows, each by one thread. `work` has `room` numbers for each thread.
void mmtp_refine(const Refiner *refiner, const Trail *trails, int64_t count, float *work, int64_t room, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        refine(*refiner, trails[i], work + thread * room);
    }
}
}
