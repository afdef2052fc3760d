/* SPDX-License-Identifier: GPL-2.0-only */
/* The parameters of the module. */
#ifndef VBW_PARAMS_H
#define VBW_PARAMS_H

unsigned int vbw_slice_ns(void);
unsigned int vbw_buffer_count(void);

#endif /* VBW_PARAMS_H */
