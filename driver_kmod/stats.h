/* SPDX-License-Identifier: GPL-2.0-only */
/* Memory statistics. */
#ifndef VBW_STATS_H
#define VBW_STATS_H

#include <linux/workqueue.h>

#include "vballoon_walk_wire.h"
#include "work.h"

/**
 * struct vbw_stats - the statistics queue
 * @shared: of the device
 * @vq: the queue, or NULL
 * @refill: takes the used buffer back and offers newer numbers
 * @entries: the buffer
 */
struct vbw_stats {
	struct vbw_shared *shared;
	struct virtqueue *vq;
	struct work_struct refill;
	struct vballoon_stat entries[VBALLOON_S_NR];
};

void vbw_stats_setup(struct vbw_stats *stats, struct vbw_shared *shared);
int vbw_stats_prime(struct vbw_stats *stats);
void vbw_stats_request(struct vbw_stats *stats);
void vbw_stats_cancel(struct vbw_stats *stats);

#endif /* VBW_STATS_H */
