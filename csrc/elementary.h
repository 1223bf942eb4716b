// exp and the logistic function on vectors; included once for each instruction set.

namespace difffit::DF_ISA {

// exp(x) for |x| <= 87: x = n·ln 2 + r, |r| <= ln 2/2, exp(r) = 1 + r + r²·P(r). P is a minimax polynomial; relative
// error of exp(r) 5e-9 before rounding, of the result about 1e-7. NaN gives NaN.
DF_INLINE vf exp_bounded(vf x) {
  const float magic = 12582912.0f;  // 1.5·2^23: the sum has n in its low bits
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.381446724e-03f);
  p = p * r + 8.368780836e-03f;
  p = p * r + 4.166839272e-02f;
  p = p * r + 1.666651964e-01f;
  p = p * r + 4.999999404e-01f;
  p = (p * r) * r + r + 1.0f;
  const vu power = ((vu)shifted + 127u) << 23;  // the low 9 bits of `shifted` are those of n
  return p * (vf)power;
}

// exp(x) for x <= 0, and 0 below -87: no denormal numbers, which would be slow.
DF_INLINE vf exp_nonpositive(vf x) {
  const vf e = exp_bounded(max_or(splat(-87.0f), x));
  return x < -87.0f ? vf{} : e;
}

}  // namespace difffit::DF_ISA
