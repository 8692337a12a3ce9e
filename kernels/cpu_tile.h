/*
 * cpu_tile.h - one key block of attention, for one instruction set. cpu_attn.c includes it once for
 * each, with
 *   ISA     suffix of the names
 *   TARGET  attribute of the functions
 *   LANES   floats in a vector
 *   ROWS    rows of the register tile, ROWS x 16 accumulators: as many as hide the latency of a
 *           multiply-add (4 cycles, 2 of them begun in each) and fit the registers
 */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, ISA)
#define VF FN(vf)
#define VI FN(vi)
#define VU FN(vu)
#define GEMM FN(gemm)
#define WIDEN FN(widen)
#define INLINE TARGET static inline __attribute__((always_inline))

typedef float VF __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * LANES), may_alias));
/* For bits that may be a NaN's: arithmetic on them wraps. */
typedef uint32_t VU __attribute__((vector_size(4 * LANES), may_alias));

INLINE VF FN(select)(VI mask, VF yes, VF no)
{
    return (VF)((mask & (VI)yes) | (~mask & (VI)no));
}

/*
 * 2^x for x <= 0, to 2 units in the last place; exactly 1 at 0, 0 below -126, NaN of NaN.
 * x = n + f with n whole (adding 1.5 * 2^23 rounds there) and |f| <= 1/2; 2^f by the polynomial of
 * least relative error (2e-9) whose value at 0 is 1.
 */
INLINE VF FN(exp2)(VF x)
{
    const VF t = x + 0x1.8p23f;
    const VF f = x - (t - 0x1.8p23f);
    const VF two_n = (VF)(((VU)t << 23) + (127u << 23));
    VF y = f * 1.5353362e-4f + 1.3398875e-3f;

    y = y * f + 9.6184369e-3f;
    y = y * f + 5.5503324e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return FN(select)(x < -126.0f, (VF){0}, y * two_n);
}

/* To a narrower format: in steps of its last bit, to nearest, ties to even. NaN stays NaN. */
INLINE VF FN(round)(VF p, const struct cpu_grid *to)
{
    const VU bits = (VU)p, odd = (bits >> to->drop) & 1;
    const VU normal = (bits + ((1u << (to->drop - 1)) - 1) + odd) & ~((1u << to->drop) - 1);

    return FN(select)(p >= to->normal, (VF)normal, (p + to->magic) - to->magic);
}

/* c[rows][cols] = a[rows][n] b[n][cols], plus c * decay[rows] where there is a decay. */
INLINE void GEMM(float *c, int c_stride, const float *a, int a_stride, const float *b, int b_stride,
                 int rows, int cols, int n, const float *decay)
{
    enum { VECTORS = 16 / LANES };

    for (int j = 0; j < cols; j += 16)
        for (int i = 0; i < rows; i += ROWS) {
            VF sum[ROWS][VECTORS] = {{{0}}};

            for (int k = 0; k < n; k++) {
                UNROLL
                for (int x = 0; x < VECTORS; x++) {
                    const VF bk = *(const VF *)(b + k * b_stride + j + x * LANES);

                    UNROLL
                    for (int r = 0; r < ROWS; r++)
                        sum[r][x] += a[(i + r) * a_stride + k] * bk;
                }
            }
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                UNROLL
                for (int x = 0; x < VECTORS; x++) {
                    VF *out = (VF *)(c + (i + r) * c_stride + j + x * LANES);

                    if (decay)
                        sum[r][x] += *out * decay[i + r];
                    *out = sum[r][x];
                }
            }
        }
}

/* binary16 numbers that stand in the upper halves of x; see f16_to_f32(). */
INLINE VF FN(from_f16)(VF x)
{
    const VI a = ((VI)x & 0x7fffffff) >> 3, sign = (VI)x ^ ((VI)x & 0x7fffffff);
    const VF subnormal = (VF)(a + (113 << 23)) - 0x1p-14f;
    const VF above = FN(select)(a >= 31 << 23, (VF)(a + (224 << 23)), (VF)(a + (112 << 23)));

    return (VF)(sign | (VI)FN(select)(a < 1 << 23, subnormal, above));
}

/* n halves, n a multiple of 8; up to a multiple of LANES there are zeros behind them. */
INLINE void WIDEN(float *to, const uint16_t *from, int n, enum sage_dtype dtype)
{
    for (int i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++)
            to[i + j] = bf16_to_f32(from[i + j]);
    for (int i = 0; dtype == SAGE_F16 && i < n; i += LANES)
        *(VF *)(to + i) = FN(from_f16)(*(VF *)(to + i));
}

INLINE void FN(load_v)(struct cpu_tile *t, const char *v, int64_t stride, int keys,
                       enum sage_dtype dtype)
{
    for (int key = 0; key < keys; key++)
        WIDEN(t->v[key], (const uint16_t *)(v + key * stride), t->d, dtype);
    for (int key = keys; key < BLOCK_K; key++) /* P is 0 there; 0 * what was there may be NaN */
        memset(t->v[key], 0, sizeof(float) * (size_t)t->v_columns);
}

INLINE float FN(largest)(VF x)
{
    float y = x[0];

    for (int i = 1; i < LANES; i++)
        y = x[i] > y ? x[i] : y;
    return y;
}

INLINE float FN(total)(VF x)
{
    float y = 0;

    for (int i = 0; i < LANES; i++)
        y += x[i];
    return y;
}

/*
 * Dot products of row r to scores, in place; their maximum. A NaN score is no maximum, but stays in
 * the row and makes its sums NaN. So does what is not finite, for -inf is for hidden keys.
 */
INLINE float FN(scores)(struct cpu_tile *t, int r, const float *k_scale)
{
    const bool partial = t->first[r] > 0 || t->last[r] < BLOCK_K;
    float *row = t->p[r];
    VF top = (VF){0} - INFINITY;
    VI key;

    for (int i = 0; i < LANES; i++)
        key[i] = i;
    for (int j = 0; j < BLOCK_K; j += LANES, key += LANES) {
        const VF scale = *(const VF *)(k_scale + j) * t->q_scale[r];
        VF s = *(VF *)(row + j);

        /* integers are below 2^22: below 2^105 no product is Inf, beyond it none is known */
        s *= FN(select)(scale < 0x1p105f, scale, (VF){0} + NAN);
        s += s * 0;
        if (t->masked) { /* a key that is masked out is not seen, whatever it holds */
            const VF b = *(VF *)(t->bias[r] + j);
            s = FN(select)(b == (VF){0} - INFINITY, b, s + b);
        }
        if (partial)
            s = FN(select)((key >= t->first[r]) & (key < t->last[r]), s, (VF){0} - INFINITY);
        *(VF *)(row + j) = s;
        top = FN(select)(s > top, s, top);
    }
    return FN(largest)(top);
}

/* Scores of row r to P, in place, and what the row remembers: maximum, sums, decay. */
INLINE void FN(softmax)(struct cpu_tile *t, int r, const float *k_scale)
{
    const struct cpu_grid *to = &t->grid;
    const float top = FN(scores)(t, r, k_scale);
    const float max = top > t->max[r] ? top : t->max[r];
    const float from = max == -INFINITY ? 0 : max; /* nothing seen yet: 2^(-inf - 0) is 0 */
    const float decay = FN(exp2)((VF){0} + (t->max[r] - from))[0];
    VF sum = {0}, p_sum = {0};

    for (int j = 0; j < BLOCK_K; j += LANES) {
        VF *at = (VF *)(t->p[r] + j);
        const VF p = FN(exp2)(*at - from);

        *at = FN(round)(p * to->scale, to);
        sum += p;
        p_sum += *at;
    }
    t->sum[r] = t->sum[r] * decay + FN(total)(sum);
    t->p_sum[r] = t->p_sum[r] * decay + FN(total)(p_sum);
    t->max[r] = max;
    t->decay[r] = decay;
}

TARGET static void FN(step)(struct cpu_tile *t, const uint16_t *k, enum sage_dtype k_dtype,
                            const float *k_scale, const char *v, int64_t v_stride, int keys,
                            enum sage_dtype v_dtype)
{
    const int rows = (t->rows + ROWS - 1) / ROWS * ROWS;

    WIDEN(t->k[0], k, t->d * BLOCK_K, k_dtype);
    GEMM(t->p[0], BLOCK_K, t->q[0], SAGE_MAX_HEAD_DIM, t->k[0], BLOCK_K, rows, BLOCK_K, t->d, NULL);
    for (int r = 0; r < t->rows; r++)
        FN(softmax)(t, r, k_scale);
    FN(load_v)(t, v, v_stride, keys, v_dtype);
    GEMM(t->o[0], SAGE_MAX_HEAD_DIM, t->p[0], BLOCK_K, t->v[0], SAGE_MAX_HEAD_DIM, rows,
         t->v_columns, BLOCK_K, t->decay);
}

#undef JOIN_
#undef JOIN
#undef FN
#undef VF
#undef VI
#undef VU
#undef GEMM
#undef WIDEN
#undef INLINE
#undef ISA
#undef TARGET
#undef LANES
#undef ROWS
