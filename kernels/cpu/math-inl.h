// Functions of vectors whose libm counterparts take one number at a time. Included after vec-inl.h.

// e^x for x <= 0 (and NaN), relative error below 2e-7: x = n ln 2 + r, |r| <= ln 2 / 2, a
// polynomial in r (Cephes expf), and n into the exponent's bits. Below the smallest normal number:
// 0.
inline VecF Exp(VecF x) {
  constexpr float kLowest = -87.33f;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the last bits
  const VecI underflow = x < kLowest;
  const VecF clamped = underflow ? Broadcast(kLowest) : x;
  const VecF shifted = clamped * 1.44269504088896341f + kRound;
  const VecF n = shifted - kRound;
  const VecF r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = Broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The low bits of `shifted` are n: moved to the exponent they multiply by 2^n.
  const VecU exponent = reinterpret_cast<VecU>(shifted) << 23;
  const VecF result = reinterpret_cast<VecF>(reinterpret_cast<VecU>(p) + exponent);
  const VecF defined = x == x ? result : x;
  return underflow ? VecF{} : defined;
}

// tanh x, relative error below 4e-7: (1 - e^-2|x|) / (1 + e^-2|x|), and near zero, where that
// cancels, an odd polynomial (Cephes tanhf).
inline VecF Tanh(VecF x) {
  const VecU sign = reinterpret_cast<VecU>(x) & 0x80000000u;
  const VecF magnitude = reinterpret_cast<VecF>(reinterpret_cast<VecU>(x) ^ sign);
  const VecF e = Exp(magnitude * -2.0f);
  const VecF large = (1.0f - e) / (1.0f + e);
  const VecF z = magnitude * magnitude;
  VecF p = Broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const VecF small = p * z * magnitude + magnitude;
  const VecF result = magnitude < 0.625f ? small : large;
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(result) | sign);
}
