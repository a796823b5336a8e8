/* Rotary position embedding: the frequencies of every kind, and cos/sin for the rows of a batch.
 *
 * The rule, shared with llmcoopt/reference.py: inverse frequencies in double, rounded to float32; angle = float32(position) * frequency in
 * float32, as the models were trained; cosine and sine of that angle in double, times the attention factor. */
#include <math.h>
#include <stdbool.h>

#include "model.h"

#define PI 3.14159265358979323846

static double wavelength_frequency(const lco_rope_config *rope, double frequency) /* llama3 */
{
    double wavelength = 2.0 * PI / frequency;
    double low = rope->original_max / rope->low_freq_factor, high = rope->original_max / rope->high_freq_factor;
    if (wavelength > low)
        return frequency / rope->factor;
    if (wavelength < high)
        return frequency;
    double smooth = (rope->original_max / wavelength - rope->low_freq_factor) / (rope->high_freq_factor - rope->low_freq_factor);
    return (1.0 - smooth) * frequency / rope->factor + smooth * frequency;
}

/* yarn: the dimension whose wave turns `rotations` times over the original context. */
static double yarn_dimension(const lco_rope_config *rope, int32_t head_dim, double rotations)
{
    return head_dim * log(rope->original_max / (rotations * 2.0 * PI)) / (2.0 * log(rope->theta));
}

static double yarn_keep(const lco_rope_config *rope, int32_t head_dim, int32_t pair) /* 1: keep the frequency, 0: interpolate */
{
    double low = yarn_dimension(rope, head_dim, rope->beta_fast), high = yarn_dimension(rope, head_dim, rope->beta_slow);
    if (rope->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0.0);
    high = fmin(high, head_dim - 1.0);
    if (low == high)
        high += 0.001;
    return 1.0 - fmin(fmax((pair - low) / (high - low), 0.0), 1.0);
}

static float inverse_frequency(const lco_rope_config *rope, int32_t head_dim, int32_t pair, int64_t length)
{
    double exponent = 2.0 * pair / head_dim, frequency = pow(rope->theta, -exponent);
    switch (rope->kind) {
    case LCO_ROPE_DEFAULT:
        break;
    case LCO_ROPE_LINEAR:
        frequency /= rope->factor;
        break;
    case LCO_ROPE_DYNAMIC:
        if ((double)length > rope->original_max) {
            double stretch = rope->factor * (double)length / rope->original_max - (rope->factor - 1.0);
            frequency = pow(rope->theta * pow(stretch, head_dim / (head_dim - 2.0)), -exponent);
        }
        break;
    case LCO_ROPE_YARN: {
        double keep = yarn_keep(rope, head_dim, pair);
        frequency = frequency / rope->factor * (1.0 - keep) + frequency * keep;
        break;
    }
    case LCO_ROPE_LLAMA3:
        frequency = wavelength_frequency(rope, frequency);
        break;
    case LCO_ROPE_LONGROPE:
        frequency /= ((double)length > rope->original_max ? rope->long_factor : rope->short_factor)[pair];
        break;
    }
    return (float)frequency;
}

static bool depends_on_length(lco_rope_kind kind) { return kind == LCO_ROPE_DYNAMIC || kind == LCO_ROPE_LONGROPE; }

void lco_rope_tables(const lco_rope_config *rope, int32_t head_dim, const lco_item *items, int64_t n_items, float *cos_out, float *sin_out)
{
    const int32_t half = head_dim / 2;
    for (int32_t pair = 0; pair < half; pair++) {
        float frequency = inverse_frequency(rope, head_dim, pair, 0);
        for (int64_t i = 0; i < n_items; i++) {
            const lco_item *item = &items[i];
            if (depends_on_length(rope->kind))
                frequency = inverse_frequency(rope, head_dim, pair, item->rope_length);
            for (int64_t t = 0; t < item->len; t++) {
                float angle = (float)(item->pos + t) * frequency;
                int64_t at = (item->row + t) * half + pair;
                cos_out[at] = (float)(cos((double)angle) * rope->attention_factor);
                sin_out[at] = (float)(sin((double)angle) * rope->attention_factor);
            }
        }
    }
}
