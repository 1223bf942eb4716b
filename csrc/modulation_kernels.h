// One branch of one sample of modulation.cpp; included once for each instruction set. Null pointers: what is not there.

namespace difffit::DF_ISA {

template <class T>
DF_KERNEL void modulation_forward_row(const T* m, const float* bias, const float* norm, const float* gamma,
                                      const float* beta, float* scale, float* shift, float* gate, float* gate_bias,
                                      int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    vf shift_d = load(m + d, lanes) + load(bias + d, lanes);
    vf scale_d = 1.0f + (load(m + D + d, lanes) + load(bias + D + d, lanes));
    if (norm != nullptr) {
      shift_d += load(norm + D + d, lanes) * scale_d;
      scale_d *= load(norm + d, lanes);
    }
    store(scale + d, scale_d, lanes);
    store(shift + d, shift_d, lanes);
    if (beta != nullptr) {
      vf gate_d = load(m + 2 * D + d, lanes) + load(bias + 2 * D + d, lanes);
      if (gamma != nullptr) gate_d *= load(gamma + d, lanes);
      store(gate + d, gate_d, lanes);
      store(gate_bias + d, gate_d * load(beta + d, lanes), lanes);
    }
  });
}

// The sums dbias, dnorm, dgamma, dbeta are added to.
template <class T>
DF_KERNEL void modulation_backward_row(const float* dscale, const float* dshift, const float* dgate,
                                       const float* dgate_bias, const T* m, const float* bias, const float* norm,
                                       const float* gamma, const float* beta, T* dm, float* dbias, float* dnorm,
                                       float* dgamma, float* dbeta, int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    vf dscale_d = load(dscale + d, lanes);
    const vf dshift_d = load(dshift + d, lanes);
    if (norm != nullptr) {
      const vf scale = 1.0f + (load(m + D + d, lanes) + load(bias + D + d, lanes));
      store(dnorm + d, load(dnorm + d, lanes) + dscale_d * scale, lanes);
      store(dnorm + D + d, load(dnorm + D + d, lanes) + dshift_d * scale, lanes);
      dscale_d = load(norm + d, lanes) * dscale_d + load(norm + D + d, lanes) * dshift_d;
    }
    store(dm + d, dshift_d, lanes);
    store(dm + D + d, dscale_d, lanes);
    store(dbias + d, load(dbias + d, lanes) + dshift_d, lanes);
    store(dbias + D + d, load(dbias + D + d, lanes) + dscale_d, lanes);
    if (beta != nullptr) {
      vf gate = load(m + 2 * D + d, lanes) + load(bias + 2 * D + d, lanes);
      const vf dbias_d = load(dgate_bias + d, lanes);
      vf dgate_d = load(dgate + d, lanes) + dbias_d * load(beta + d, lanes);
      if (gamma != nullptr) {
        store(dgamma + d, load(dgamma + d, lanes) + dgate_d * gate, lanes);
        gate *= load(gamma + d, lanes);
        dgate_d *= load(gamma + d, lanes);
      }
      store(dbeta + d, load(dbeta + d, lanes) + dbias_d * gate, lanes);
      store(dm + 2 * D + d, dgate_d, lanes);
      store(dbias + 2 * D + d, load(dbias + 2 * D + d, lanes) + dgate_d, lanes);
    }
  });
}

}  // namespace difffit::DF_ISA
