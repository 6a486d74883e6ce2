// Mean and sum of squared deviations that merge (Welford; Chan, Golub and LeVeque 1983).
#pragma once

#include "accelrt/types.h"

namespace accelrt {

struct Welford {
  float count = 0.f;
  float mean = 0.f;
  float m2 = 0.f;

  ACCELRT_HOST_DEVICE void merge(float other_count, float other_mean, float other_m2) {
    if (other_count == 0.f) return;
    const float total = count + other_count;
    const float weight = other_count / total;
    const float delta = other_mean - mean;
    mean += delta * weight;
    m2 += other_m2 + delta * delta * count * weight;
    count = total;
  }

  ACCELRT_HOST_DEVICE void merge(const Welford& other) { merge(other.count, other.mean, other.m2); }

  // From the sums of (x - pivot) and (x - pivot)^2 over n values.
  ACCELRT_HOST_DEVICE static Welford from_sums(float n, float pivot, float s1, float s2) {
    Welford w;
    if (n == 0.f) return w;
    const float offset = s1 / n;
    w.count = n;
    w.mean = pivot + offset;
    const float m2 = s2 - s1 * offset;
    w.m2 = m2 < 0.f ? 0.f : m2;  // NaN stays
    return w;
  }
};

}  // namespace accelrt
