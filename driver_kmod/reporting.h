/* SPDX-License-Identifier: GPL-2.0-only */
/* Free page reporting. */
#ifndef VBW_REPORTING_H
#define VBW_REPORTING_H

#include <linux/page_reporting.h>

#include "work.h"

/**
 * struct vbw_reporting - the reporting queue
 * @shared: the shared state of the device
 * @vq: the queue, or NULL
 * @info: the callback that the kernel calls
 * @on: whether reporting is registered with the kernel
 */
struct vbw_reporting {
	struct vbw_shared *shared;
	struct virtqueue *vq;
	struct page_reporting_dev_info info;
	bool on;
};

int vbw_reporting_start(struct vbw_reporting *reporting);
void vbw_reporting_stop(struct vbw_reporting *reporting);

#endif /* VBW_REPORTING_H */
