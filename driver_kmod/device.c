// SPDX-License-Identifier: GPL-2.0-only
/*
 * The life of a device: features, queues, probe, remove, suspend. What the
 * queues are for is in the files named after them.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_ids.h>

#include "compat.h"
#include "debugfs.h"
#include "device.h"

enum vbw_vq {
	VBW_VQ_INFLATE,
	VBW_VQ_DEFLATE,
	VBW_VQ_STATS,
	VBW_VQ_HINT,
	VBW_VQ_REPORTING,
	VBW_VQ_WALK,
	VBW_VQ_MAX
};

static void acked(struct virtqueue *vq)
{
	struct vbw_device *vb = vq->vdev->priv;

	wake_up(&vb->shared.acked);
}

static void stats_used(struct virtqueue *vq)
{
	struct vbw_device *vb = vq->vdev->priv;

	vbw_stats_request(&vb->stats);
}

static void walk_used(struct virtqueue *vq)
{
	struct vbw_device *vb = vq->vdev->priv;

	virtqueue_disable_cb(vq);
	wake_up(&vb->session.push.wait);
}

/*
 * One row for each queue, in the order of the standard. A queue whose feature
 * was not negotiated has no name, and the transport numbers those that have
 * one without a gap.
 */
static const struct {
	const char *name;
	vq_callback_t *callback;
	int feature;		/* -1: always there */
} queues[VBW_VQ_MAX] = {
	[VBW_VQ_INFLATE] = { "inflate", acked, -1 },
	[VBW_VQ_DEFLATE] = { "deflate", acked, -1 },
	[VBW_VQ_STATS] = { "stats", stats_used, VBALLOON_F_STATS_VQ },
	[VBW_VQ_HINT] = { "free_page_vq", acked, VBALLOON_F_FREE_PAGE_HINT },
	[VBW_VQ_REPORTING] = { "reporting_vq", acked, VBALLOON_F_PAGE_REPORTING },
	[VBW_VQ_WALK] = { "walk_vq", walk_used, VBALLOON_F_FREE_PAGE_WALK },
};

static bool has_queue(struct vbw_device *vb, int i)
{
	return queues[i].feature < 0 || vbw_has(&vb->shared, queues[i].feature);
}

#ifdef VBW_HAVE_VIRTQUEUE_INFO
static int find_vqs(struct vbw_device *vb, struct virtqueue *vqs[])
{
	struct virtqueue_info info[VBW_VQ_MAX] = {};
	int i;

	for (i = 0; i < VBW_VQ_MAX; i++) {
		if (!has_queue(vb, i))
			continue;
		info[i].name = queues[i].name;
		info[i].callback = queues[i].callback;
	}
	return virtio_find_vqs(vb->shared.vdev, VBW_VQ_MAX, vqs, info, NULL);
}
#else
static int find_vqs(struct vbw_device *vb, struct virtqueue *vqs[])
{
	vq_callback_t *callbacks[VBW_VQ_MAX] = {};
	const char *names[VBW_VQ_MAX] = {};
	int i;

	for (i = 0; i < VBW_VQ_MAX; i++) {
		if (!has_queue(vb, i))
			continue;
		names[i] = queues[i].name;
		callbacks[i] = queues[i].callback;
	}
	return virtio_find_vqs(vb->shared.vdev, VBW_VQ_MAX, vqs, callbacks, names, NULL);
}
#endif

/* Gives each part its queue, or NULL. */
static void give_vqs(struct vbw_device *vb, struct virtqueue *vqs[])
{
	vb->balloon.inflate_vq = vqs[VBW_VQ_INFLATE];
	vb->balloon.deflate_vq = vqs[VBW_VQ_DEFLATE];
	vb->stats.vq = vqs[VBW_VQ_STATS];
	vb->hinting.vq = vqs[VBW_VQ_HINT];
	vb->reporting.vq = vqs[VBW_VQ_REPORTING];
	vb->walk_vq = vqs[VBW_VQ_WALK];
}

static void del_vqs(struct vbw_device *vb)
{
	struct virtqueue *none[VBW_VQ_MAX] = {};

	vb->shared.vdev->config->del_vqs(vb->shared.vdev);
	give_vqs(vb, none);
}

static int init_vqs(struct vbw_device *vb)
{
	struct virtqueue *vqs[VBW_VQ_MAX] = {};
	int err;

	err = find_vqs(vb, vqs);
	if (err)
		return err;
	give_vqs(vb, vqs);
	if (!vb->stats.vq)
		return 0;
	err = vbw_stats_prime(&vb->stats);
	if (err)
		del_vqs(vb);
	return err;
}

/* The value that free pages are expected to keep, before DRIVER_OK. */
static void write_poison(struct vbw_device *vb)
{
	u32 poison = 0;

	if (!vbw_has(&vb->shared, VBALLOON_F_PAGE_POISON))
		return;
	if (!want_init_on_free())
		memset(&poison, PAGE_POISON, sizeof(poison));
	virtio_cwrite_le(vb->shared.vdev, struct vballoon_config, poison_val, &poison);
}

static void start(struct vbw_device *vb)
{
	vbw_shared_start(&vb->shared);
	virtio_device_ready(vb->shared.vdev);
	vbw_session_start(&vb->session, vb->walk_vq);
}

static void changed(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	vbw_balloon_changed(&vb->balloon);
	vbw_hinting_changed(&vb->hinting);
	vbw_session_changed(&vb->session);
}

/* Afterwards no work is queued any more, and none runs. */
static void quiesce(struct vbw_device *vb)
{
	vbw_shared_stop(&vb->shared);
	vbw_reporting_stop(&vb->reporting);
	vbw_session_cancel(&vb->session);
	vbw_hinting_cancel(&vb->hinting);
	vbw_balloon_cancel(&vb->balloon);
	vbw_stats_cancel(&vb->stats);
}

/* Takes all memory back; the device gets no more of it. */
static void let_go(struct vbw_device *vb)
{
	vbw_balloon_deflate_all(&vb->balloon);
	vbw_hinting_release(&vb->hinting);
	virtio_reset_device(vb->shared.vdev);
	vbw_session_detach(&vb->session);
	del_vqs(vb);
}

/* Hinting and walks have a queue of work each: a host that takes no hints stops no walk. */
static int make_workqueues(struct vbw_device *vb)
{
	vb->hint_wq = alloc_ordered_workqueue("vballoon-hint", WQ_FREEZABLE);
	if (!vb->hint_wq)
		return -ENOMEM;
	vb->walk_wq = alloc_ordered_workqueue("vballoon-walk", WQ_FREEZABLE);
	if (!vb->walk_wq) {
		destroy_workqueue(vb->hint_wq);
		return -ENOMEM;
	}
	return 0;
}

static struct vbw_device *allocate(struct virtio_device *vdev)
{
	struct vbw_device *vb = kzalloc(sizeof(*vb), GFP_KERNEL);

	if (!vb)
		return NULL;
	if (make_workqueues(vb)) {
		kfree(vb);
		return NULL;
	}
	vdev->priv = vb;
	vbw_shared_setup(&vb->shared, vdev);
	vbw_balloon_setup(&vb->balloon, &vb->shared);
	vbw_stats_setup(&vb->stats, &vb->shared);
	vbw_hinting_setup(&vb->hinting, &vb->shared, vb->hint_wq);
	vb->reporting.shared = &vb->shared;
	return vb;
}

static void deallocate(struct vbw_device *vb)
{
	vbw_balloon_free(&vb->balloon);
	destroy_workqueue(vb->walk_wq);
	destroy_workqueue(vb->hint_wq);
	kfree(vb);
}

/* Start hinting, balloon and reporting, or none of them. */
static int start_parts(struct vbw_device *vb)
{
	int err = vbw_hinting_start(&vb->hinting);

	if (err)
		return err;
	err = vbw_balloon_start(&vb->balloon);
	if (err)
		goto err_hinting;
	write_poison(vb);
	err = vbw_reporting_start(&vb->reporting);
	if (err)
		goto err_balloon;
	return 0;

err_balloon:
	vbw_balloon_stop(&vb->balloon);
err_hinting:
	vbw_hinting_stop(&vb->hinting);
	return err;
}

static int probe(struct virtio_device *vdev)
{
	struct vbw_device *vb;
	int err;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "no configuration space\n");
		return -EINVAL;
	}
	vb = allocate(vdev);
	if (!vb)
		return -ENOMEM;
	vbw_session_setup(&vb->session, &vb->shared, vb->walk_wq);
	err = init_vqs(vb);
	if (err)
		goto err_session;
	err = start_parts(vb);
	if (err)
		goto err_vqs;
	start(vb);
	vbw_debugfs_add(vb);
	changed(vdev);
	return 0;

err_vqs:
	del_vqs(vb);
err_session:
	vbw_session_free(&vb->session);
	deallocate(vb);
	return err;
}

static void remove(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	vbw_debugfs_remove(vb);
	quiesce(vb);
	vbw_balloon_stop(&vb->balloon);
	vbw_hinting_stop(&vb->hinting);
	let_go(vb);
	vbw_session_free(&vb->session);
	deallocate(vb);
}

#ifdef VBW_HAVE_SHUTDOWN
/*
 * The kernel ends. Nobody who waits for the device may keep a lock that others
 * need until then, so the queues are broken first and the waiters woken. Memory is
 * not taken back, and the parts stay registered: what they do fails at once.
 */
static void shutdown(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	virtio_break_device(vdev);
	quiesce(vb);
	virtio_reset_device(vdev);
}
#endif

#ifdef CONFIG_PM_SLEEP
static int freeze(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	quiesce(vb);
	let_go(vb);
	return 0;
}

static int restore(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;
	int err;

	err = init_vqs(vb);
	if (err)
		return err;
	write_poison(vb);
	err = vbw_reporting_start(&vb->reporting);
	if (err) {
		del_vqs(vb);
		return err;
	}
	start(vb);
	changed(vdev);
	vbw_balloon_update_actual(&vb->balloon);
	return 0;
}
#endif

/* Features that this guest has no use for, before they are negotiated. */
static int validate(struct virtio_device *vdev)
{
	/*
	 * Where free pages are neither cleared nor poisoned, the device need
	 * not know of a value. Where they are and the device cannot know the value, a
	 * free page that was discarded, or left out of a snapshot or a migration, would
	 * come back without it and be taken for corrupted.
	 */
	if (!want_init_on_free() && !page_poisoning_enabled_static()) {
		__virtio_clear_bit(vdev, VBALLOON_F_PAGE_POISON);
	} else if (!virtio_has_feature(vdev, VBALLOON_F_PAGE_POISON)) {
		__virtio_clear_bit(vdev, VBALLOON_F_PAGE_REPORTING);
		__virtio_clear_bit(vdev, VBALLOON_F_FREE_PAGE_HINT);
		__virtio_clear_bit(vdev, VBALLOON_F_FREE_PAGE_WALK);
	}

	/* Little-endian structures throughout: wrong for this guest without. */
	if (IS_ENABLED(CONFIG_CPU_BIG_ENDIAN) && !virtio_has_feature(vdev, VIRTIO_F_VERSION_1))
		return -EINVAL;

	/* Page numbers are physical, whatever IOMMU is between. */
	__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	return 0;
}

static const struct virtio_device_id id_table[] = {
	{ VIRTIO_ID_BALLOON, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, id_table);

static const unsigned int features[] = {
	VBALLOON_F_MUST_TELL_HOST,
	VBALLOON_F_STATS_VQ,
	VBALLOON_F_DEFLATE_ON_OOM,
	VBALLOON_F_FREE_PAGE_HINT,
	VBALLOON_F_PAGE_POISON,
	VBALLOON_F_PAGE_REPORTING,
	VBALLOON_F_FREE_PAGE_WALK,
};

struct virtio_driver vbw_driver = {
	.feature_table = features,
	.feature_table_size = ARRAY_SIZE(features),
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.id_table = id_table,
	.validate = validate,
	.probe = probe,
	.remove = remove,
#ifdef VBW_HAVE_SHUTDOWN
	.shutdown = shutdown,
#endif
	.config_changed = changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = freeze,
	.restore = restore,
#endif
};
